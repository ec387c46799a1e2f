"""Measure autoencoders, one or several side by side, by how well they reconstruct images.

B batch, C channels, H and W the images' height and width, d Inception's features.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kl_vae import __version__
from kl_vae.data import MAX_PIXELS, JoinedSource, Source, resolve_root, to_float
from kl_vae.data.config import check_crop_fits
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.batches import Numbered, batches_of_a_size, latent_noise
from kl_vae.inference.coding import decode_latents, encode_images
from kl_vae.inference.evaluation_report import (
    FILES,
    RESULTS,
    Evaluation,
    ModelRecord,
    Record,
    as_text,
    evaluate_records,
    read_features,
    rows_of,
    skipped_images,
    write_features,
    write_files,
)
from kl_vae.inference.images import LoadedImage, loaded_units
from kl_vae.inference.load import (
    Checkpoint,
    checkpoint_name,
    connect_ranks,
    load_model_on,
    model_fingerprint,
)
from kl_vae.inference.progress import Progress, units_of
from kl_vae.inference.reconstruct import MEASURED_ON_DEVICE, unit_size
from kl_vae.inference.sources import as_roots, open_sources
from kl_vae.inference.tiling import Tiling
from kl_vae.metrics.fid import find_inception, load_inception
from kl_vae.metrics.perceptual import load_lpips
from kl_vae.metrics.similarity import ms_ssim, mse, ssim
from kl_vae.model import AutoEncoderKL, pad
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.files import display_name
from kl_vae.runtime.outputs import check_output_folder, check_outputs
from kl_vae.runtime.randomness import generator_for
from kl_vae.visual.image_files import as_saved

logger = logging.getLogger(__name__)

METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "rfid")
IN_COLOUR = ("lpips", "rfid")  # of networks that were trained on RGB


@dataclass(frozen=True)
class EvaluateConfig:
    """The metrics of an evaluation, and which part of the images they are of.

    Attributes:
        resize: short side that images are resized to first, in pixels; None: as they are.
        crop: side of the square that is then cut out of the middle; None: the whole image.
        mode: decode the posterior's `mode`, or a `sample` of it.
        seed: of the samples; each also depends on its image's path.
        precision: fp32, bf16 or fp16.
        metrics: some of psnr, ssim, ms_ssim, lpips and rfid.
    """

    resize: int | None
    crop: int | None
    mode: str = "mode"
    seed: int = 0
    precision: str = "fp32"
    metrics: tuple[str, ...] = ("psnr", "ssim", "ms_ssim")


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured, over all ranks.

    Attributes:
        models: of each checkpoint, in their order.
        count: number of images that were measured.
        skipped: path and reason of each image that could not be used; a warning names each.
        folder: the output folder; None: nothing was written.
        lpips_net: the network of LPIPS; None: it was not measured.
    """

    models: tuple[Evaluation, ...]
    count: int
    skipped: tuple[tuple[str, str], ...]
    folder: Path | None
    lpips_net: str | None

    def table(self) -> str:
        """Return a table for a terminal: a column for each model, a row for each metric."""
        rows = rows_of(self.models, self.lpips_net or "")
        return as_text([model.name for model in self.models], rows)


def evaluate(
    checkpoints: Checkpoint | Sequence[Checkpoint],
    images: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
    metrics: Sequence[str] = ("psnr", "ssim", "ms_ssim"),
    resize: int | None = None,
    crop: int | None = None,
    whole: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    mode: Literal["mode", "sample"] = "mode",
    seed: int = 0,
    batch_size: int = 8,
    num_workers: int = 4,
    configs: str | None | Sequence[str | None] = None,
    ema: bool = True,
    device: str = "auto",
    precision: str = "fp32",
    fast: str = "auto",
    compile: bool = False,
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg",
    lpips_features: str | Path | None = None,
    lpips_heads: str | Path | None = None,
    fid_weights: str | Path | None = None,
    resume: bool = False,
) -> EvaluationResult:
    """Measure checkpoints on images: reconstruction metrics, KL and statistics of the latents.

    Under torchrun all ranks call this and share the work.

    Args:
        checkpoints: each what `AutoEncoderKL.from_checkpoint` takes; or models on one device, which
            are put into eval mode and else left as they are (`configs`, `ema`, `device`, `fast` and
            `compile` are about checkpoints).
        images: folders of images or tar shards, single files, or patterns of them.
        out: the folder to write results.md, results.json and per_image.csv to; None: nothing is
            written, which ranks on several machines cannot do.
        names: of the checkpoints in the results; None: what differs in their paths.
        metrics: some of psnr, ssim, ms_ssim, lpips and rfid; KL and latents always are measured.
        resize: short side that images are resized to first, in pixels; None: the crop.
        crop: side of the square that is then cut out of the middle; None: the models' resolution.
        whole: measure whole images of any size, without a crop.
        include: patterns of the files of folders to take; none: all.
        exclude: patterns of the files of folders to leave out.
        max_pixels: larger images are skipped before they are decoded.
        mode: decode the posterior's mode, or a sample of it.
        seed: of the samples; each also depends on its image's key.
        batch_size: images that a process encodes at once.
        num_workers: processes that decode images, for each process that encodes.
        configs: a config file or the name of a shipped config, one for all checkpoints or one each;
            None: as the checkpoint says.
        ema: load the moving average of the weights, where a checkpoint has one.
        device: auto, cuda, cuda:N, mps or cpu.
        precision: fp32, bf16 or fp16; what is not finite is computed again in fp32.
        fast: auto, exact or off; see `accelerate_as`.
        compile: use `torch.compile`.
        lpips_net: the network of LPIPS: vgg, alex or squeeze.
        lpips_features: file of its weights; None: torchvision's, downloaded once.
        lpips_heads: file of its linear heads; None: the published ones, downloaded once.
        fid_weights: file of the weights of rfid's network; None: downloaded once.
        resume: continue what is unfinished in `out`.

    Raises:
        ValueError: an argument is impossible or the images cannot be used; what was measured is
            kept in `out` for `resume`.
        RunError: a rank or a data worker was lost.
    """
    given: list[Checkpoint]
    given = [checkpoints] if isinstance(checkpoints, Checkpoint) else list(checkpoints)
    names = _column_names(given, names)
    configs = _one_each(configs, len(given))
    roots = as_roots(images)
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metrics: {metric!r}: give some of {', '.join(METRICS)}")
    with connect_ranks(given, device) as ranks, ExitStack() as stack:
        # weights that are missing are noticed first
        lpips = inception = None
        if "lpips" in metrics:
            lpips = load_lpips(lpips_net, lpips_features, lpips_heads, ranks.device)
        if "rfid" in metrics:
            # first on one rank: the others find what it downloaded, or download it on their machine
            ranks.on_rank_zero(lambda: find_inception(fid_weights))
            inception = load_inception(find_inception(fid_weights), ranks.device)
        models = [
            load_model_on(ranks, checkpoint, config, ema, fast, compile)
            for checkpoint, config in zip(given, configs, strict=True)
        ]
        resize, crop = choose_size(models, names, resize, crop, whole)
        chosen = tuple(metric for metric in METRICS if metric in metrics)
        settings = EvaluateConfig(resize, crop, mode, seed, precision, chosen)
        folder = None if out is None else resolve_root(str(out))

        def open_images() -> JoinedSource:
            channels = models[0].config.in_channels
            source, folders = open_sources(roots, channels, include, exclude, max_pixels)
            if folder is not None:
                check_output_folder(folder, folders)
                check_outputs(folder, FILES, source.files, earlier=RESULTS)
            _ = source.fingerprint  # goes to the other ranks with it
            return source

        source = ranks.on_rank_zero(open_images)  # once, so that the ranks share out the same list
        evaluator = Evaluator(models, names, source, settings, batch_size, lpips, inception)
        networks: dict[str, Any] = {}
        if lpips is not None:
            files = [None if file is None else str(file) for file in (lpips_features, lpips_heads)]
            networks["lpips"] = [lpips_net, *files]
        if inception is not None:
            networks["rfid"] = [None if fid_weights is None else str(fid_weights)]
        # all that the metrics depend on, but for rounding: devices and batch sizes may change
        identity = {
            "command": "evaluate",
            "checkpoints": [
                [x if isinstance(x, str) else checkpoint_name(x), model_fingerprint(model)]
                for x, model in zip(given, models, strict=True)
            ],
            "images": source.fingerprint,
            "max_pixels": max_pixels,
            **asdict(settings),
            **networks,
        }
        units = units_of(len(source), unit_size(len(source)))
        progress = Progress(folder or _temporary_folder(ranks, stack), identity, resume, ranks)
        _measure(evaluator, settings, source, units, progress, ranks, num_workers)
        ranks.gather(None)  # all units are done

        def finish() -> EvaluationResult:
            skipped = skipped_images(progress.read(len(units)), source)
            count = len(source) - len(skipped)
            if not count:
                progress.close()
                raise ValueError(
                    f"none of the {len(skipped)} images can be used ({skipped[0]['path']}: "
                    f"{skipped[0]['reason']}); give other images"
                )

            def features(position: int) -> Iterator[Tensor]:
                paths = (progress.path(unit, ".npy") for unit in range(len(units)))
                return read_features(paths, position)

            evaluations = evaluate_records(
                lambda: progress.read(len(units)),
                None if inception is None else features,
                names,
            )
            result = EvaluationResult(
                models=tuple(evaluations),
                count=count,
                skipped=tuple((entry["path"], entry["reason"]) for entry in skipped),
                folder=folder,
                lpips_net=lpips_net if lpips is not None else None,
            )
            if folder is not None:
                about = {
                    "heading": _heading(roots, settings, count, len(skipped)),
                    "images": [display_name(root) for root in roots],
                    "number": count,
                    "skipped": skipped,
                    **asdict(settings),
                    "lpips_net": result.lpips_net,
                    "versions": {"kl_vae": __version__, "torch": torch.__version__},
                }
                about_models = [
                    {
                        "checkpoint": checkpoint_name(x),
                        "parameters": sum(parameter.numel() for parameter in model.parameters()),
                        "downsampling_factor": model.downsampling_factor,
                    }
                    for x, model in zip(given, models, strict=True)
                ]
                rows = rows_of(evaluations, lpips_net)
                write_files(
                    folder,
                    evaluations,
                    rows,
                    progress.read(len(units)),
                    source,
                    about=about,
                    about_models=about_models,
                )
            progress.close()
            return result

        return ranks.on_rank_zero(finish)


def _temporary_folder(ranks: Ranks, stack: ExitStack) -> Path:
    """Make a folder for the records of ranks of one machine; it goes with `stack`."""
    return Path(
        ranks.on_rank_zero(
            lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="kl_vae-"))
        )
    )


def _one_each(configs: str | None | Sequence[str | None], number: int) -> list[str | None]:
    configs = [configs] if configs is None or isinstance(configs, str) else list(configs)
    if len(configs) not in (1, number):
        raise ValueError(
            f"configs: {len(configs)} for {number} checkpoints; give one for all, or one each"
        )
    return configs * number if len(configs) == 1 else configs


def _measure(
    evaluator: Evaluator,
    config: EvaluateConfig,
    source: JoinedSource,
    units: list[range],
    progress: Progress,
    ranks: Ranks,
    num_workers: int,
) -> None:
    """Do this rank's units."""
    loading = loaded_units(
        source,
        units,
        progress,
        ranks,
        resize=config.resize,
        crop=config.crop,
        num_workers=num_workers,
    )
    with loading as loaded:
        for unit, images in loaded:
            record, features = evaluator.unit(images)
            for index, reason in record["skipped"]:
                logger.warning("skipped %s: %s", source.name(index), reason)
            if features is not None:
                write_features(progress.path(unit, ".npy"), features)
            progress.write(unit, record)


def _heading(roots: Sequence[str], config: EvaluateConfig, count: int, skipped: int) -> str:
    part = "whole" if config.crop is None else f"crops of {config.crop} x {config.crop}"
    if config.resize is not None:
        part += f" after the short side was resized to {config.resize}"
    return (
        f"{count} image{'' if count == 1 else 's'} of {', '.join(map(display_name, roots))}, "
        f"{part}; {skipped} skipped; {config.precision}; the {config.mode} of the posterior "
        "decoded."
    )


def choose_size(
    models: Sequence[AutoEncoderKL],
    names: Sequence[str],
    resize: int | None,
    crop: int | None,
    whole: bool,
) -> tuple[int | None, int | None]:
    """Choose what images are resized to and what is cut out: by default the models' resolution.

    Args:
        models: that are to be compared.
        names: of them.
        resize: as asked for; None: to the crop.
        crop: as asked for; None: the resolution.
        whole: neither, but for a resize that is asked for.

    Raises:
        ValueError: models that cannot be compared, or sizes that exclude each other.
    """
    _check_alike("in_channels", models, names, "give checkpoints for the same kind of images")
    if whole and crop is not None:
        raise ValueError(f"crop={crop}: whole images have none; give crop or whole")
    if whole:
        return resize, None
    if crop is None:
        _check_alike("resolution", models, names, "give crop for all of them, or whole")
        crop = models[0].config.resolution
    check_crop_fits(crop if resize is None else resize, crop)
    return resize or crop, crop


def _check_alike(key: str, models: Sequence[AutoEncoderKL], names: Sequence[str], fix: str) -> None:
    values = [getattr(model.config, key) for model in models]
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise ValueError(f"{key}={values[0]} of {names[0]} and {value} of {name}: {fix}")


def _column_names(checkpoints: Sequence[Checkpoint], names: Sequence[str] | None) -> list[str]:
    """Return the given names of checkpoints, or their short ones, no two alike.

    Raises:
        ValueError: not one for each, one without letters, or two alike.
    """
    chosen = short_names([*map(_path_of, checkpoints)]) if names is None else list(names)
    if len(chosen) != len(checkpoints):
        raise ValueError(
            f"names: {len(chosen)} for {len(checkpoints)} checkpoints; give one for each"
        )
    for i, name in enumerate(chosen):
        if not name.strip() or not name.isprintable():
            raise ValueError(f"names: {name!r} cannot head a column; give printable letters")
        if name in chosen[:i]:
            raise ValueError(
                f"two checkpoints are called {name}; give names, one for each, or leave one out"
            )
    return chosen


def _path_of(checkpoint: Checkpoint) -> str:
    return "model" if isinstance(checkpoint, AutoEncoderKL) else str(checkpoint)


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """Return each checkpoint by that part of its path in which it differs from the others.

    `runs/a/checkpoints/last.pt` and `runs/b/checkpoints/last.pt` are `a` and `b`; one alone is
    its file's or folder's name. Suffixes that all have are left out.
    """
    paths = [_parts(checkpoint) for checkpoint in checkpoints]
    while _all_agree(paths, 0):
        paths = [path[1:] for path in paths]
    while len(paths) > 1 and _all_agree(paths, -1):
        paths = [path[:-1] for path in paths]
    names = ["/".join(path) for path in paths]
    suffixes = {os.path.splitext(name)[1] for name in names}
    # of a number, such as that of version-1.5, it is no suffix
    if len(suffixes) == 1 and (suffix := suffixes.pop())[1:].isalpha():
        names = [name.removesuffix(suffix) for name in names]
    return names


def _parts(checkpoint: str) -> list[str]:
    parts = [part for part in os.path.normpath(checkpoint).split(os.sep) if part]
    return parts or [checkpoint]


def _all_agree(paths: list[list[str]], position: int) -> bool:
    """Whether one part is the same in all of them, and none would be left empty without it."""
    return min(map(len, paths)) > 1 and len({path[position] for path in paths}) == 1


class Evaluator:
    """Measures units of images; what a unit gives depends on no other.

    Args:
        models: on one device, in eval mode, of images with the same number of channels.
        names: what they are called.
        source: of the images.
        config: what is measured.
        batch_size: images of one size that are encoded at once.
        lpips: what `load_lpips` gives, where it is among the metrics.
        inception: what `load_inception` gives, where rfid is among them.

    Raises:
        ValueError: the images have no colours, and a metric needs them.
    """

    def __init__(
        self,
        models: Sequence[AutoEncoderKL],
        names: Sequence[str],
        source: Source,
        config: EvaluateConfig,
        batch_size: int,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        inception: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        for metric in IN_COLOUR:
            if metric in config.metrics and source.channels not in (1, 3, 4):
                raise ValueError(
                    f"{metric}: images of {source.channels} channels have no colours for its "
                    "network to see; leave it out of metrics"
                )
        self._models = list(zip(models, names, strict=True))
        self._source = source
        self._config = config
        self._batch_size = batch_size
        self._lpips = lpips
        self._inception = inception

    @torch.inference_mode()
    def unit(self, images: Iterable[LoadedImage]) -> tuple[Record, Tensor | None]:
        """Measure the images of a unit.

        Returns:
            The record, and where they are asked for the features of the images and of each model's
            reconstructions, [1 + models, images, d].

        Raises:
            ValueError: a reconstruction has NaN or infinity, also in fp32.
        """
        sizes: list[list[int]] = []
        skipped: list[tuple[int, str]] = []
        measured = [ModelRecord(model.latent_channels) for model, _ in self._models]
        features = []
        device = next(self._models[0][0].parameters()).device
        usable = _usable(images, skipped)
        batches = batches_of_a_size(usable, _size_of, self._batch_size, consecutive=True)
        for batch in batches:
            indices, x = [index for index, _ in batch], torch.stack([image for _, image in batch])
            sizes += [[index, *x.shape[2:]] for index in indices]
            pictures = [_as_saved(x.to(device))]
            for (model, name), of_model in zip(self._models, measured, strict=True):
                posterior, decoded = self._autoencode(model, name, indices, x)
                pictures.append(_as_saved(decoded.to(device)))
                of_model.add(posterior, self._metrics(pictures[0], pictures[-1]))
            if self._inception is not None:
                features.append(torch.stack([self._inception(_rgb(x)) for x in pictures]))
        models = [of_model.values() for of_model in measured]
        record = {"images": sizes, "skipped": skipped, "models": models}
        return record, torch.cat(features, 1) if features else None

    def _autoencode(
        self, model: AutoEncoderKL, name: str, indices: Sequence[int], x: Tensor
    ) -> tuple[DiagonalGaussianDistribution, Tensor]:
        """The posteriors of [B, C, H, W], and what they are decoded to, as large."""
        config, source = self._config, self._source
        tiling = Tiling("auto" if config.crop is None else "whole")
        names = [f"{name}: {source.name(index)}" for index in indices]
        padded = torch.stack([pad(image[None], model.downsampling_factor)[0] for image in x])
        posterior = encode_images(model, padded, config.precision, tiling, names)
        if config.mode == "sample":
            keys = [("reconstruct", config.seed, source.key(index)) for index in indices]
            noise = [latent_noise(model, x[0], generator_for(*key)) for key in keys]
            z = posterior.sample(noise=torch.stack(noise))
        else:
            z = posterior.mode()
        decoded = decode_latents(model, z, config.precision, tiling, names)
        return posterior, decoded[:, :, : x.shape[2], : x.shape[3]]

    def _metrics(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """[B] of each metric, for pictures [B, C, H, W] as files hold them."""
        data_range = (0.0, 255.0 if before.dtype == torch.uint8 else 1.0)
        metrics = {}
        if before.shape[2] * before.shape[3] > MEASURED_ON_DEVICE:
            before, after = before.cpu(), after.cpu()
        # PSNR follows from the MSE, which is finite also where both are the same
        measures = {"psnr": ("mse", mse), "ssim": ("ssim", ssim), "ms_ssim": ("ms_ssim", ms_ssim)}
        for metric, (key, measure) in measures.items():
            if metric in self._config.metrics:
                metrics[key] = measure(before, after, data_range)
        if self._lpips is not None:
            metrics["lpips"] = self._lpips(to_float(_rgb(before)), to_float(_rgb(after)))
        return metrics


def _usable(images: Iterable[LoadedImage], skipped: list[tuple[int, str]]) -> Iterator[Numbered]:
    for loaded in images:
        if loaded.image is None:
            skipped.append((loaded.index, loaded.reason))
        else:
            yield loaded.index, loaded.image


def _size_of(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[1:]
    return height, width


def _as_saved(x: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] as files hold it: see `as_saved`."""
    return torch.stack([as_saved(image) for image in x])


def _rgb(pictures: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 3, H, W]: grey three times, or without transparency."""
    return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3]
