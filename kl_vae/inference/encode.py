"""Encoding of a data set into a latent folder, measurement of latent statistics, or both.

The result depends only on the images and settings, not on the number of ranks or on whether the
command was killed and resumed.

Shapes: B batch, z latent channels, h and w latent height and width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kl_vae.checkpoints.export import write_export
from kl_vae.checkpoints.run_files import read_checkpoint
from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from kl_vae.data import (
    MAX_PIXELS,
    BadImage,
    Batch,
    ImageDataset,
    JoinedSource,
    Key,
    ValueRange,
    batch_loader,
    resolve_root,
)
from kl_vae.data.config import check_crop_fits
from kl_vae.data.latent_format import DTYPES, LatentIndex, LatentSettings
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.coding import encode_images
from kl_vae.inference.latent_folder import (
    EncodedShard,
    Labels,
    LatentFolder,
    class_labels,
    names_checksum,
    nothing_usable,
)
from kl_vae.inference.load import checkpoint_name, connect_ranks, load_model_on
from kl_vae.inference.progress import show_progress, units_of
from kl_vae.inference.sources import as_roots, open_sources, range_of
from kl_vae.inference.tiling import Tiling
from kl_vae.latents import LatentNormalization
from kl_vae.metrics.moments import RunningMoments, latent_moments, latent_normalization
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.device import PRECISIONS
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.outputs import check_outside
from kl_vae.runtime.published_config import ConfigSource
from kl_vae.runtime.randomness import normal_noise

logger = logging.getLogger(__name__)

What = Literal["moments", "sample", "mode"]

_WHOLE = Tiling("whole")  # with other modes, rounding would depend on the free memory


@dataclass(frozen=True)
class EncodeConfig:
    """Settings for encoding and storage; see the arguments of `encode_dataset`.

    Raises:
        ValueError: a value is invalid.
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
    """Result of `encode_dataset`, over all ranks.

    Attributes:
        images: number of encoded images, including those of earlier commands.
        skipped: number of unusable images; a warning names each of them.
        latents: statistics of the raw latents, for `AutoEncoderKL.latents`.
        index: the content of index.json in `out`; None if latents were not stored.
        verified: the folder was already complete, its checksums are correct, and its images have
            not changed since.
        exported: the weights were written to `statistics`; false if not requested or if the file
            already existed.
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
    value_range: ValueRange | None = None,
    pages: str | None = None,
    batch_size: int = 8,
    num_workers: int = 4,
    config: ConfigSource | None = None,
    ema: bool = True,
    device: str = "auto",
    precision: str = "fp32",
    fast: str = "auto",
    compile: bool = False,
    resume: bool = False,
    verify: bool = False,
    overwrite: bool = False,
) -> EncodingResult:
    """Encode images into a latent folder for `kl_vae.data.LatentDataset`.

    Under torchrun all ranks call this and share the work.

    Args:
        checkpoint: a checkpoint accepted by `AutoEncoderKL.from_checkpoint`, or a model. A model
            is switched to eval mode and stays on its device; `config`, `ema`, `device`, `fast` and
            `compile` do not apply to it.
        images: folders of images or tar shards, single files, or glob patterns.
        out: output folder; None: only measure statistics.
        statistics: file to write the weights to, as `kl_vae.export` does, with the latent
            statistics in their config.
        per_channel: in `statistics`, normalise each channel by its own mean and std.
        what: store moments (mean, then log variance), a sample of the posterior, or its mode.
        normalize: store latents normalised by the model's `normalize_latents`.
        flip: also encode the horizontally flipped images.
        dtype: data type of the stored latents: fp32, fp16 or bf16.
        shard_size: number of images per file.
        labels: store class labels: the stored label of each image, or its top-level folder.
        seed: random seed of samples; each sample also depends on the key of its image and on
            whether the image is flipped.
        resize: resize the short side of images to this many pixels; None: the crop.
        crop: side of the centre crop in pixels; None: the resolution in the model's config.
        include: glob patterns of files in folders to include; empty: all files.
        exclude: glob patterns of files in folders to exclude.
        max_pixels: larger images are skipped before decoding.
        value_range: stored values of black and white, as `data.range` of a config; None: as stated
            by the checkpoint, else auto.
        pages: what the pages of TIFF files are, as `data.pages` of a config.
        batch_size: number of images that each process encodes at once.
        num_workers: number of image loading processes per rank.
        config: a config (a file, a shipped name, or keys); None: taken from the checkpoint.
        ema: load the EMA weights if the checkpoint has them.
        device: auto, cuda, cuda:N, mps or cpu.
        precision: precision of the encoder: fp32, bf16 or fp16.
        fast: auto, exact or off; see `accelerate_as`.
        compile: use `torch.compile`.
        resume: continue an unfinished folder `out`, or verify and repair a complete one. Shards
            with images that have changed (by size and modification time) are encoded again.
        verify: with `resume`, compare the content of the images instead, which reads all of them.
        overwrite: replace latents or unfinished work in `out`, and the file `statistics`.

    Raises:
        ValueError: an argument is invalid or the images are unusable; finished shards are kept for
            `resume`. Or `out` contains latents, or another process writes to it.
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
    if verify and not (resume and out is not None):
        raise ValueError("verify=True: compares latents with their images; give out and resume")
    with connect_ranks([checkpoint], device) as ranks:
        if statistics is not None:
            ranks.on_rank_zero(lambda: _check_new(Path(statistics), resume, overwrite))
        model = load_model_on(ranks, checkpoint, config, ema, fast, compile)
        crop = model.config.resolution if crop is None else crop
        resize = crop if resize is None else resize
        check_size(crop, model.downsampling_factor, "crop")
        check_crop_fits(resize, crop)
        # list the files once, so that all ranks divide the same images
        value_range = range_of(model, value_range)
        channels = model.config.in_channels
        folder = None if out is None else resolve_root(str(out))

        def open_images() -> JoinedSource:
            source, folders = open_sources(
                as_roots(images), channels, include, exclude, max_pixels, value_range, pages
            )
            if folder is not None:
                check_outside(folder, folders)
            if statistics is not None:
                check_outside(Path(statistics).parent, folders)
            return source

        source = ranks.on_rank_zero(open_images)
        dataset = ImageDataset(source, crop, resize, flip=False, seed=0, training=False)
        if folder is None:
            result = measure_latents(model, dataset, settings, ranks, per_channel)
        else:
            result = encode_folder(
                model,
                dataset,
                folder,
                settings,
                ranks,
                checkpoint=checkpoint_name(checkpoint),
                per_channel=per_channel,
                resume=resume,
                verify=verify,
                overwrite=overwrite,
            )
        if statistics is None:
            return result
        return ranks.on_rank_zero(lambda: _export(model, Path(statistics), result, overwrite))


def _check_new(path: Path, resume: bool, overwrite: bool) -> None:
    """Raise ValueError unless a new file can be created at `path`, before hours of encoding."""
    if path.exists() and not (resume or overwrite):
        raise ValueError(
            f"statistics={path}: already exists; give --overwrite to replace it, or a new file"
        )
    if not path.parent.is_dir():
        raise ValueError(f"statistics={path}: no such folder: {path.parent}; create it")


def check_size(size: int, factor: int, name: str = "size") -> None:
    """Raise ValueError unless the image size `size` is a multiple of `factor` (f)."""
    if size < 1 or size % factor:
        nearest = max(1, round(size / factor)) * factor
        raise ValueError(f"{name}={size}: must be a multiple of {factor}; give {nearest}")


def _export(
    model: AutoEncoderKL, path: Path, result: EncodingResult, overwrite: bool
) -> EncodingResult:
    tensors = {key: x.cpu() for key, x in model.without_loss().state_dict().items()}
    params = {**model.params, "latents": dataclasses.asdict(result.latents)}
    if path.exists() and not overwrite:  # only with `resume`
        _check_same(path, tensors, params)
        return result
    try:
        write_export(path, tensors, params, pixel_range=model.pixel_range, overwrite=overwrite)
    except ValueError:
        logger.error("could not write the measured statistics: %s", result.latents)
        raise
    return dataclasses.replace(result, exported=True)


def _check_same(path: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> None:
    """Raise ValueError unless a file contains these weights and statistics."""
    content = read_checkpoint(path)
    earlier = content["model"]
    same = content["config"]["model"]["params"] == params and earlier.keys() == tensors.keys()
    if not (same and all(torch.equal(earlier[key], x) for key, x in tensors.items())):
        raise ValueError(
            f"statistics={path}: contains other weights or statistics; give --overwrite to replace "
            "it, or a new file"
        )


def measure_latents(
    model: AutoEncoderKL,
    dataset: ImageDataset,
    config: EncodeConfig,
    ranks: Ranks,
    per_channel: bool = False,
) -> EncodingResult:
    """Measure the latent statistics of a data set without storing its latents.

    Raises:
        ValueError: moments are not finite, the device runs out of memory, or no image is usable.
    """
    # one batch per unit; fp32 cannot overflow
    config = dataclasses.replace(config, what="mode", normalize=False, flip=False, dtype="fp32")
    units = units_of(len(dataset), config.batch_size)[ranks.rank :: ranks.world_size]
    moments, images, skipped = RunningMoments.empty(model.latent_channels), 0, 0
    for shard in encode_units(model, dataset, units, config, ranks):
        moments = moments.merge(shard.moments)
        images += len(shard.positions)
        skipped += len(shard.bad)
    gathered = ranks.gather((moments, images, skipped))
    moments = functools.reduce(RunningMoments.merge, (moments for moments, _, _ in gathered))
    images, skipped = (sum(counts) for counts in list(zip(*gathered, strict=True))[1:])
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
    verify: bool = False,
    overwrite: bool = False,
) -> EncodingResult:
    """Encode a data set into a latent folder; all ranks must call this.

    Args:
        model: the autoencoder, in eval mode.
        dataset: the images, without random augmentation.
        out: the folder, which is created if necessary.
        config: settings for encoding and storage.
        ranks: the ranks that share the work.
        checkpoint: name of the model, stored in the index.
        per_channel: `per_channel` of the result's `latents`.
        resume: continue an unfinished folder, or verify a complete one.
        verify: compare the content of the images, not their size and modification time.
        overwrite: replace the latents in the folder.

    Raises:
        ValueError: see `LatentFolder` and `encode_units`; or a label or the scale of the latents
            is missing, or safetensors is not installed.
    """
    safetensors_bytes({}, {})  # raises if safetensors is not installed
    if config.normalize and model.latents is None:
        raise ValueError(
            "normalize: the scale of this model's latents is unknown; measure it with "
            "kl-vae encode --statistics FILE and use that FILE as the checkpoint, or store raw "
            "latents"
        )
    labels = ranks.on_rank_zero(lambda: class_labels(dataset.source) if config.labels else None)
    settings = ranks.on_rank_zero(lambda: latent_settings(model, dataset, config, labels))
    folder = LatentFolder(
        out,
        settings,
        dataset.source,
        labels,
        ranks,
        resume=resume,
        verify=verify,
        overwrite=overwrite,
    )
    with folder:
        units = [folder.units[unit] for unit in folder.todo]
        unusable = {} if labels is None else labels.unusable
        shards = encode_units(model, dataset, units, config, ranks, unusable)
        for unit, shard in zip(folder.todo, shards, strict=True):
            folder.write(unit, shard)
        index = folder.finish(checkpoint)
    latents = LatentNormalization(**vars(index.statistics), per_channel=per_channel)
    return EncodingResult(index.number, index.skipped, latents, index, folder.verified)


def latent_settings(
    model: AutoEncoderKL, dataset: ImageDataset, config: EncodeConfig, labels: Labels | None
) -> LatentSettings:
    """Return all settings that the latents of a data set depend on.

    Batch size and device are not included, since they only affect rounding.
    """
    return LatentSettings(
        what=config.what,
        dtype=config.dtype,
        normalized=config.normalize,
        flipped=config.flip,
        f=model.downsampling_factor,
        channels=model.latent_channels,
        crop=dataset.crop_size[0],  # a square
        resize=dataset.resize or dataset.crop_size[0],
        precision=config.precision,
        seed=config.seed if config.what == "sample" else None,
        images=len(dataset),
        shard_size=config.shard_size,
        labels=None if labels is None else labels.checksum,
        source=names_checksum(dataset.source),
        weights=weights_sha256(model),
        normalization=None if model.latents is None else dataclasses.asdict(model.latents),
        range=dataset.source.pixel_format.value_range,
        pages=dataset.source.pixel_format.pages,
    )


def weights_sha256(model: AutoEncoderKL) -> str:
    """Return the SHA-256 of the names, shapes and values of a model's tensors, without its loss."""
    digest = hashlib.sha256()
    for key, x in sorted(model.without_loss().state_dict().items()):
        digest.update(f"{key} {x.dtype} {list(x.shape)}\n".encode())
        # viewed as bytes, since NumPy has no bf16
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Batches(Sampler[list[Key]]):
    """Sampler of batches that never span two units."""

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
    unusable: Mapping[int, str] = MappingProxyType({}),
) -> Iterator[EncodedShard]:
    """Encode units of a data set in order, with a progress bar on rank 0.

    Image files are decoded ahead, across units. Images that are `unusable`, by their index, are
    skipped for the reason given there.

    Raises:
        ValueError: see `encode_images` and `stored_latents`.
    """
    if not units:
        return
    batches = _Batches(units, config.batch_size)
    pin_memory = ranks.device.type == "cuda"
    # no timeout, since disks may be slow
    loader = batch_loader(dataset, batches, config.num_workers, pin_memory, timeout_seconds=0)
    loaded = iter(loader)
    with show_progress(sum(map(len, units)), ranks) as update:
        for unit in units:
            shard = EncodedShard(RunningMoments.empty(model.latent_channels))
            for _ in range(0, len(unit), config.batch_size):
                batch: Batch = _without(next(loaded), unusable)
                for image in batch.bad:
                    logger.warning("skipped %s: %s", image.name, image.reason)
                shard.bad += batch.bad
                usable = batch.usable()
                if usable.names:
                    _encode_batch(shard, model, dataset, usable, config)
                update(len(batch.names))
            yield shard


def _without(batch: Batch, unusable: Mapping[int, str]) -> Batch:
    """Return the batch in which the images at these positions are unusable."""
    images = list(zip(batch.positions.tolist(), batch.names, strict=True))
    bad = [BadImage(name, unusable[i]) for i, name in images if name and i in unusable]
    names = tuple("" if i in unusable else name for i, name in images)
    return batch._replace(names=names, bad=(*batch.bad, *bad))


@torch.inference_mode()
def _encode_batch(
    shard: EncodedShard,
    model: AutoEncoderKL,
    dataset: ImageDataset,
    batch: Batch,
    config: EncodeConfig,
) -> None:
    """Encode a batch of usable images, and append it to the shard."""
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
    """Convert posteriors to the stored latents, [B, z, h, w] or [B, 2z, h, w], on the CPU.

    Normalised moments are the moments of the normalised latents: the log variance is shifted by
    2 log(scale).

    Args:
        model: the model that computed the posteriors.
        posterior: posteriors of B images.
        config: settings for storage.
        keys: keys of the B images; samples depend on seed, key and view.
        names: names of the B images, used in errors.
        view: latents or flipped.

    Raises:
        ValueError: a value is out of range for the dtype.
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
            f"{names[bad]}: a latent of {latents[bad].abs().max().item():.6g} is out of range for "
            f"{config.dtype}; give --dtype bf16 or fp32"
        )
    return stored


def _stored_logvar(
    model: AutoEncoderKL, posterior: DiagonalGaussianDistribution, normalized: bool
) -> Tensor:
    if not normalized:
        return posterior.parameters.chunk(2, dim=1)[1]  # not clamped
    # std of raw latents, [1, z, h, w]; in float64, so that a large shift does not lose precision
    one = torch.ones(posterior.mean.shape[1:], dtype=torch.float64)[None]
    std = model.denormalize_latents(one) - model.denormalize_latents(torch.zeros_like(one))
    return posterior.logvar - 2.0 * std.log().to(posterior.logvar)
