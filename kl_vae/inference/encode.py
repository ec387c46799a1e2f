"""Encode a data set: into a folder of latents, to measure their statistics, or both.

The result is a function of the images and settings alone: not of the number of ranks, nor of
whether the command was killed and resumed.

B batch, n images of a shard, z latent channels, h and w height and width of the latents.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kl_vae.checkpoints.export import write_export
from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from kl_vae.data import MAX_PIXELS, Batch, ImageDataset, Key, batch_loader, resolve_root
from kl_vae.data.config import check_crop_fits
from kl_vae.data.latent_format import DTYPES, LatentIndex, LatentSettings
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.coding import encode_images
from kl_vae.inference.latent_folder import (
    EncodedShard,
    Labels,
    LatentFolder,
    class_labels,
    nothing_usable,
)
from kl_vae.inference.load import checkpoint_name, connect_ranks, load_model_on
from kl_vae.inference.progress import show_progress, units_of
from kl_vae.inference.sources import as_roots, open_sources
from kl_vae.inference.tiling import Tiling
from kl_vae.latents import LatentNormalization
from kl_vae.metrics.moments import RunningMoments, latent_moments, latent_normalization
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.device import PRECISIONS
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.randomness import normal_noise

logger = logging.getLogger(__name__)

What = Literal["moments", "sample", "mode"]

_WHOLE = Tiling("whole")  # the last bits of other modes depend on how much memory is free


@dataclass(frozen=True)
class EncodeConfig:
    """How images are encoded and what is stored: arguments of `encode_dataset`.

    Raises:
        ValueError: an impossible value.
    """

    what: What = "moments"
    normalize: bool = False
    flip: bool = False
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    shard_size: int = 1024
    labels: bool = False
    seed: int = 0
    batch_size: int = 8
    num_workers: int = 4
    precision: str = "fp32"

    def __post_init__(self) -> None:
        choices = {"what": get_args(What), "dtype": DTYPES, "precision": PRECISIONS}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r}: give one of {', '.join(allowed)}")
        for key in ("shard_size", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: give at least 1")


@dataclass(frozen=True)
class EncodingResult:
    """What `encode_dataset` did, over all ranks.

    Attributes:
        images: number of images that were encoded, now or before.
        skipped: number of images that could not be used; a warning names each.
        latents: statistics of the raw latents, as `AutoEncoderKL.latents` takes them.
        index: the content of index.json in `out`; None: latents were not stored.
        verified: the folder was complete before, and its checksums are right.
        exported: the weights were written to `statistics`; False: not wanted, or there already.
    """

    images: int
    skipped: int
    latents: LatentNormalization
    index: LatentIndex | None = None
    verified: bool = False
    exported: bool = False


def encode_dataset(
    checkpoint: str | Path | AutoEncoderKL,
    images: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    statistics: str | Path | None = None,
    per_channel: bool = False,
    what: What = "moments",
    normalize: bool = False,
    flip: bool = False,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16",
    shard_size: int = 1024,
    labels: bool = False,
    seed: int = 0,
    resize: int | None = None,
    crop: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    batch_size: int = 8,
    num_workers: int = 4,
    config: str | None = None,
    ema: bool = True,
    device: str = "auto",
    precision: str = "fp32",
    fast: str = "auto",
    compile: bool = False,
    resume: bool = False,
) -> EncodingResult:
    """Encode images into a folder of latents that `kl_vae.data.LatentDataset` reads.

    Under torchrun all ranks call this and share the work.

    Args:
        checkpoint: what `AutoEncoderKL.from_checkpoint` takes; or a model, which is put into eval
            mode and else left as it is, on its device (`config`, `ema`, `device`, `fast` and
            `compile` are about checkpoints).
        images: folders of images or tar shards, single files, or patterns of them.
        out: the folder to write; None: the statistics alone are measured.
        statistics: a file to write: the weights, as `kl_vae.export` writes them, with the
            statistics of the latents in their config.
        per_channel: in `statistics` normalise each channel by its own mean and std.
        what: store moments (mean, then log variance), a sample of the posterior, or its mode.
        normalize: store what the model's `normalize_latents` gives.
        flip: encode the mirrored images as well.
        dtype: of what is stored: fp32, fp16 or bf16.
        shard_size: images per file.
        labels: store the images' classes: the label that each comes with, or its first folder.
        seed: of samples; each also depends on its image's key, and on whether it is mirrored.
        resize: short side that images are resized to, in pixels; None: the crop.
        crop: side of the square cut out of the middle; None: the resolution of the model's config.
        include: patterns of the files of folders to take; none: all.
        exclude: patterns of the files of folders to leave out.
        max_pixels: larger images are skipped before they are decoded.
        batch_size: images that a process encodes at once.
        num_workers: processes that decode images, for each process that encodes.
        config: a config file or the name of a shipped config; None: as the checkpoint says.
        ema: load the moving average of the weights, where the checkpoint has one.
        device: auto, cuda, cuda:N, mps or cpu.
        precision: of the encoder: fp32, bf16 or fp16.
        fast: auto, exact or off; see `accelerate_as`.
        compile: use `torch.compile`.
        resume: continue what is unfinished in `out`, or verify and repair what is complete.

    Raises:
        ValueError: an argument is impossible or the images cannot be used; finished shards are kept
            for `resume`.
        RunError: a rank or a data worker was lost.
    """
    settings = EncodeConfig(
        what=what,
        normalize=normalize,
        flip=flip,
        dtype=dtype,
        shard_size=shard_size,
        labels=labels,
        seed=seed,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
    )
    if out is None and statistics is None:
        raise ValueError("nothing to write: give out, statistics, or both")
    with connect_ranks([checkpoint], device) as ranks:
        if statistics is not None:
            ranks.on_rank_zero(lambda: _check_new(Path(statistics), resume))
        model = load_model_on(ranks, checkpoint, config, ema, fast, compile)
        crop = model.config.resolution if crop is None else crop
        resize = crop if resize is None else resize
        check_size(crop, model.downsampling_factor, "crop")
        check_crop_fits(resize, crop)
        # listed once, so that all ranks share out the same images
        channels = model.config.in_channels
        source, _ = ranks.on_rank_zero(
            lambda: open_sources(as_roots(images), channels, include, exclude, max_pixels)
        )
        dataset = ImageDataset(source, crop, resize, flip=False, seed=0, training=False)
        if out is None:
            result = measure_latents(model, dataset, settings, ranks, per_channel)
        else:
            result = encode_folder(
                model,
                dataset,
                resolve_root(str(out)),
                settings,
                ranks,
                checkpoint=checkpoint_name(checkpoint),
                per_channel=per_channel,
                resume=resume,
            )
        if statistics is None:
            return result
        return ranks.on_rank_zero(lambda: _export(model, Path(statistics), result))


def _check_new(path: Path, resume: bool) -> None:
    """Raise ValueError unless a new file can be made: hours may pass before it is written."""
    if path.exists() and not resume:
        raise ValueError(f"statistics={path}: exists; name a file that does not")
    if not path.parent.is_dir():
        raise ValueError(f"statistics={path}: no such folder: {path.parent}; create it")


def check_size(size: int, factor: int, name: str = "size") -> None:
    """Raise ValueError unless the side of an image is a multiple of `factor` (f)."""
    if size < 1 or size % factor:
        nearest = max(1, round(size / factor)) * factor
        raise ValueError(f"{name}={size}: must be a multiple of {factor}; give {nearest}")


def _export(model: AutoEncoderKL, path: Path, result: EncodingResult) -> EncodingResult:
    if path.exists():  # only with `resume`: the same command has written it before
        return result
    tensors = {key: x.cpu() for key, x in model.without_loss().state_dict().items()}
    try:
        write_export(path, tensors, {**model.params, "latents": dataclasses.asdict(result.latents)})
    except ValueError:
        logger.error("statistics that were measured and could not be written: %s", result.latents)
        raise
    return dataclasses.replace(result, exported=True)


def measure_latents(
    model: AutoEncoderKL,
    dataset: ImageDataset,
    config: EncodeConfig,
    ranks: Ranks,
    per_channel: bool = False,
) -> EncodingResult:
    """Measure the statistics of a data set's latents, which are not kept.

    Raises:
        ValueError: moments are not finite, the memory does not suffice, or no image can be used.
    """
    # units of one batch, of which nothing is stored that a dtype could not hold
    config = dataclasses.replace(config, what="mode", normalize=False, flip=False, dtype="fp32")
    units = units_of(len(dataset), config.batch_size)[ranks.rank :: ranks.world_size]
    moments, images, skipped = RunningMoments.empty(model.latent_channels), 0, 0
    for shard in encode_units(model, dataset, units, config, ranks):
        moments = moments.merge(shard.moments)
        images += len(shard.positions)
        skipped += len(shard.bad)
    of_ranks = ranks.gather((moments, images, skipped))
    moments = functools.reduce(RunningMoments.merge, (moments for moments, _, _ in of_ranks))
    images, skipped = (sum(counts) for counts in list(zip(*of_ranks, strict=True))[1:])
    if not images:
        raise nothing_usable(skipped)
    return EncodingResult(images, skipped, latent_normalization(moments, per_channel))


def encode_folder(
    model: AutoEncoderKL,
    dataset: ImageDataset,
    out: Path,
    config: EncodeConfig,
    ranks: Ranks,
    *,
    checkpoint: str,
    per_channel: bool = False,
    resume: bool = False,
) -> EncodingResult:
    """Encode a data set into a folder of latents; all ranks call this.

    Args:
        model: in eval mode.
        dataset: the images, with nothing drawn at random.
        out: the folder, which is created.
        config: how.
        ranks: they share the work.
        checkpoint: the name of the model in the index.
        per_channel: of the result's `latents`.
        resume: continue what is there, or verify what is complete.

    Raises:
        ValueError: as `LatentFolder` and `encode_units`; a label or the scale of the latents is
            missing; safetensors is not installed.
    """
    safetensors_bytes({}, {})  # an error now rather than after the first shard
    if config.normalize and model.latents is None:
        raise ValueError(
            "normalize: the scale of this model's latents is not known; measure it with "
            "kl-vae encode --statistics FILE and give that FILE as the checkpoint, or store raw "
            "latents"
        )
    labels = ranks.on_rank_zero(lambda: class_labels(dataset.source) if config.labels else None)
    settings = ranks.on_rank_zero(lambda: latent_settings(model, dataset, config, labels))
    folder = LatentFolder(out, settings, dataset.source, labels, ranks, resume=resume)
    units = [folder.units[unit] for unit in folder.todo]
    shards = encode_units(model, dataset, units, config, ranks)
    for unit, shard in zip(folder.todo, shards, strict=True):
        folder.write(unit, shard)
    index = folder.finish(checkpoint)
    latents = LatentNormalization(**vars(index.statistics), per_channel=per_channel)
    return EncodingResult(index.number, index.skipped, latents, index, folder.verified)


def latent_settings(
    model: AutoEncoderKL, dataset: ImageDataset, config: EncodeConfig, labels: Labels | None
) -> LatentSettings:
    """Return all that the latents of a data set depend on, but for the batch size and device.

    Those two change the last bits only.
    """
    return LatentSettings(
        what=config.what,
        dtype=config.dtype,
        normalized=config.normalize,
        flipped=config.flip,
        f=model.downsampling_factor,
        channels=model.latent_channels,
        crop=dataset.crop,
        resize=dataset.resize or dataset.crop,
        precision=config.precision,
        seed=config.seed if config.what == "sample" else None,
        images=len(dataset),
        shard_size=config.shard_size,
        labels=None if labels is None else labels.checksum,
        source=dataset.fingerprint,
        weights=weights_sha256(model),
        normalization=None if model.latents is None else dataclasses.asdict(model.latents),
    )


def weights_sha256(model: AutoEncoderKL) -> str:
    """Return 64 hex digits of the names, shapes and bits of a model's tensors, without its loss."""
    digest = hashlib.sha256()
    for key, x in sorted(model.without_loss().state_dict().items()):
        digest.update(f"{key} {x.dtype} {list(x.shape)}\n".encode())
        # as bytes: NumPy has no bf16
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Batches(Sampler[list[Key]]):
    """The batches of units; none has images of two units."""

    def __init__(self, units: Sequence[range], batch_size: int) -> None:
        self._units = units
        self._size = batch_size

    def __len__(self) -> int:
        return sum(-(-len(unit) // self._size) for unit in self._units)

    def __iter__(self) -> Iterator[list[Key]]:
        for unit in self._units:
            for start in range(0, len(unit), self._size):
                yield [(0, i, i) for i in unit[start : start + self._size]]


def encode_units(
    model: AutoEncoderKL,
    dataset: ImageDataset,
    units: Sequence[range],
    config: EncodeConfig,
    ranks: Ranks,
) -> Iterator[EncodedShard]:
    """Encode ranges of a data set's images in their order, with a progress bar on rank 0.

    Images are decoded ahead, also those of the next units.

    Raises:
        ValueError: as `encode_images` and `stored_latents`.
    """
    if not units:
        return
    batches = _Batches(units, config.batch_size)
    pin_memory = ranks.device.type == "cuda"
    # no time-out: a slow disk is waited for
    loader = batch_loader(dataset, batches, config.num_workers, pin_memory, timeout_seconds=0)
    loaded = iter(loader)
    with show_progress(sum(map(len, units)), ranks) as update:
        for unit in units:
            shard = EncodedShard(RunningMoments.empty(model.latent_channels))
            for _ in range(0, len(unit), config.batch_size):
                batch: Batch = next(loaded)
                for image in batch.bad:
                    logger.warning("skipped %s: %s", image.name, image.reason)
                shard.bad += batch.bad
                usable = batch.usable()
                if usable.names:
                    _encode_batch(shard, model, dataset, usable, config)
                update(len(batch.names))
            yield shard


@torch.inference_mode()
def _encode_batch(
    shard: EncodedShard,
    model: AutoEncoderKL,
    dataset: ImageDataset,
    batch: Batch,
    config: EncodeConfig,
) -> None:
    """Encode a batch of usable images, and add it to the shard."""
    positions = batch.positions.tolist()
    keys = [dataset.source.key(i) for i in positions]
    posterior = encode_images(model, batch.images, config.precision, _WHOLE, batch.names)
    shard.moments = shard.moments.merge(latent_moments(posterior))
    shard.latents.append(stored_latents(model, posterior, config, keys, batch.names, "latents"))
    shard.positions += positions
    if config.flip:
        flipped = batch.images.flip(3)
        posterior = encode_images(model, flipped, config.precision, _WHOLE, batch.names)
        shard.flipped.append(stored_latents(model, posterior, config, keys, batch.names, "flipped"))


def stored_latents(
    model: AutoEncoderKL,
    posterior: DiagonalGaussianDistribution,
    config: EncodeConfig,
    keys: Sequence[str],
    names: Sequence[str],
    view: str,
) -> Tensor:
    """Compute what is stored of the posteriors of B images: [B, z, h, w] or [B, 2z, h, w], on CPU.

    Normalised moments are those of the normalised latents: the log variance is shifted by
    2 log(scale).

    Args:
        model: the model that made the posteriors.
        posterior: of B images.
        config: what is stored.
        keys: of the B images; samples depend on seed, key and view.
        names: of the B images, for errors.
        view: latents or flipped.

    Raises:
        ValueError: a value is beyond the range of the dtype.
    """
    latents = posterior.mode()
    if config.what == "sample":
        shape = posterior.mean.shape[1:]
        noise = [normal_noise(shape, "encode", config.seed, key, view) for key in keys]
        latents = posterior.sample(noise=torch.stack(noise))
    if config.normalize:
        latents = model.normalize_latents(latents)
    if config.what == "moments":
        latents = torch.cat([latents, _stored_logvar(model, posterior, config.normalize)], 1)
    stored = latents.cpu().to(DTYPES[config.dtype])
    finite = stored.flatten(1).isfinite().all(1).tolist()
    if not all(finite):
        bad = finite.index(False)
        raise ValueError(
            f"{names[bad]}: has a latent of {latents[bad].abs().max().item():.6g}, beyond what "
            f"{config.dtype} holds; give --dtype bf16 or fp32"
        )
    return stored


def _stored_logvar(
    model: AutoEncoderKL, posterior: DiagonalGaussianDistribution, normalized: bool
) -> Tensor:
    if not normalized:
        return posterior.parameters.chunk(2, dim=1)[1]  # not clamped
    # std of raw latents, [1, z, h, w]; in float64, so that a large shift costs no precision
    one = torch.ones(posterior.mean.shape[1:], dtype=torch.float64)[None]
    std = model.denormalize_latents(one) - model.denormalize_latents(torch.zeros_like(one))
    return posterior.logvar - 2.0 * std.log().to(posterior.logvar)
