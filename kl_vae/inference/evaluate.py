"""Evaluation of one or several autoencoders by reconstruction metrics.

Shapes: B batch, C channels, H and W image height and width, d Inception features.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kl_vae import __version__
from kl_vae.data import MAX_PIXELS, JoinedSource, Source, ValueRange, resolve_root, to_float
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
from kl_vae.inference.progress import UNFINISHED, Progress, read_identity, units_of
from kl_vae.inference.reconstruct import MEASURED_ON_DEVICE, unit_size
from kl_vae.inference.sources import (
    as_roots,
    modification_times,
    open_sources,
    range_of,
    size_in_words,
)
from kl_vae.inference.tiling import Tiling
from kl_vae.metrics.fid import find_inception, load_inception
from kl_vae.metrics.perceptual import load_lpips
from kl_vae.metrics.similarity import SSIM_VARIANTS, SSIMVariant, ms_ssim, mse, ssim
from kl_vae.model import AutoEncoderKL, pad
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.files import display_name
from kl_vae.runtime.outputs import check_output_folder, check_outputs
from kl_vae.runtime.published_config import ConfigSource
from kl_vae.runtime.randomness import generator_for
from kl_vae.visual.image_files import as_saved

logger = logging.getLogger(__name__)

METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "rfid")
IN_COLOUR = ("lpips", "rfid")  # metrics of networks that were trained on RGB images


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation.

    Attributes:
        resize: resize the short side of images to this many pixels; None: no resizing.
        crop: side of the centre crop in pixels, after resizing; None: no crop.
        mode: decode the `mode` of the posterior, or a `sample` from it.
        seed: random seed of samples; each sample also depends on the key of its image.
        precision: fp32, bf16 or fp16.
        metrics: any of psnr, ssim, ms_ssim, lpips and rfid.
        ssim: variant of SSIM: wang or skimage, see `kl_vae.metrics.similarity.ssim`.
    """

    resize: int | None
    crop: int | None
    mode: str = "mode"
    seed: int = 0
    precision: str = "fp32"
    metrics: tuple[str, ...] = ("psnr", "ssim", "ms_ssim")
    ssim: SSIMVariant = "wang"


@dataclass(frozen=True)
class EvaluationResult:
    """Result of `evaluate`, over all ranks.

    Attributes:
        models: results of the checkpoints, in the given order.
        count: number of evaluated images.
        skipped: path and reason of each unusable image; a warning names each of them.
        folder: the output folder; None if nothing was written.
        lpips_net: the network of LPIPS; None if LPIPS was not measured.
        size: resize and crop of the images in words, such as `short side 256, center crop 256`.
        ssim: variant of SSIM.
    """

    models: tuple[Evaluation, ...]
    count: int
    skipped: tuple[tuple[str, str], ...]
    folder: Path | None
    lpips_net: str | None
    size: str
    ssim: SSIMVariant

    def table(self) -> str:
        """Format the results for the terminal: one column per model, one row per metric."""
        rows = rows_of(self.models, self.lpips_net or "", self.ssim, self.size)
        return as_text([model.name for model in self.models], rows)


def evaluate(
    checkpoints: Checkpoint | Sequence[Checkpoint],
    images: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
    metrics: Sequence[str] = ("psnr", "ssim", "ms_ssim"),
    ssim: SSIMVariant = "wang",
    resize: int | None = None,
    crop: int | None = None,
    whole: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange | None = None,
    pages: str | None = None,
    mode: Literal["mode", "sample"] = "mode",
    seed: int = 0,
    batch_size: int = 8,
    num_workers: int = 4,
    configs: ConfigSource | None | Sequence[ConfigSource | None] = None,
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
    overwrite: bool = False,
) -> EvaluationResult:
    """Evaluate checkpoints on images: reconstruction metrics, KL and latent statistics.

    Under torchrun all ranks call this and share the work.

    Args:
        checkpoints: one or several checkpoints accepted by `AutoEncoderKL.from_checkpoint`, or
            models on one device. Models are switched to eval mode; `configs`, `ema`, `device`,
            `fast` and `compile` do not apply to them.
        images: folders of images or tar shards, single files, or glob patterns.
        out: output folder for results.md, results.json and per_image.csv; None: write no files,
            which is not supported for ranks on several machines.
        names: names of the checkpoints in the results; None: the parts in which their paths differ.
        metrics: any of psnr, ssim, ms_ssim, lpips and rfid; KL and latent statistics are always
            measured.
        ssim: variant of SSIM: wang (Gaussian window) or skimage (the defaults of scikit-image), see
            `kl_vae.metrics.similarity.ssim`.
        resize: resize the short side of images to this many pixels; None: the crop.
        crop: side of the centre crop in pixels, after resizing; None: the models' resolution.
        whole: evaluate whole images of any size, without a crop.
        include: glob patterns of files in folders to include; empty: all files.
        exclude: glob patterns of files in folders to exclude.
        max_pixels: larger images are skipped before decoding.
        value_range: stored values of black and white, as `data.range` of a config; None: as stated
            by the checkpoint, else auto.
        pages: what the pages of TIFF files are, as `data.pages` of a config.
        mode: decode the mode of the posterior, or a sample from it.
        seed: random seed of samples; each sample also depends on the key of its image.
        batch_size: number of images that each process encodes at once.
        num_workers: number of image loading processes per rank.
        configs: a config (a file, a shipped name, or keys), either one for all checkpoints or one
            per checkpoint; None: taken from the checkpoint.
        ema: load the EMA weights if a checkpoint has them.
        device: auto, cuda, cuda:N, mps or cpu.
        precision: fp32, bf16 or fp16; non-finite results are recomputed in fp32.
        fast: auto, exact or off; see `accelerate_as`.
        compile: use `torch.compile`.
        lpips_net: network of LPIPS: vgg, alex or squeeze.
        lpips_features: weights file of the LPIPS network; None: the torchvision weights,
            downloaded once.
        lpips_heads: weights file of the LPIPS linear heads; None: the published ones, downloaded
            once.
        fid_weights: weights file of the Inception network; None: downloaded once.
        resume: continue unfinished work in `out`.
        overwrite: replace a result of other arguments, unfinished work and other files in `out`.

    Raises:
        ValueError: an argument is invalid or the images are unusable; finished units are kept in
            `out` for `resume`. Or `out` contains a result of other arguments, or another process
            writes to it.
        RunError: a rank or a data worker was lost.
    """
    given: list[Checkpoint]
    given = [checkpoints] if isinstance(checkpoints, Checkpoint) else list(checkpoints)
    names = _column_names(given, names)
    configs = _broadcast_configs(configs, len(given))
    roots = as_roots(images)
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metrics: {metric!r} is unknown; give any of {', '.join(METRICS)}")
    if ssim not in SSIM_VARIANTS:
        raise ValueError(f"ssim={ssim!r}: give one of {', '.join(SSIM_VARIANTS)}")
    with connect_ranks(given, device) as ranks, ExitStack() as stack:
        # load the metric networks first, so that missing weights fail early
        lpips = inception = None
        if "lpips" in metrics:
            lpips = load_lpips(lpips_net, lpips_features, lpips_heads, ranks.device)
        if "rfid" in metrics:
            # rank 0 downloads first; ranks on other machines download their own copy
            ranks.on_rank_zero(lambda: find_inception(fid_weights))
            inception = load_inception(find_inception(fid_weights), ranks.device)
        models = [
            load_model_on(ranks, checkpoint, config, ema, fast, compile)
            for checkpoint, config in zip(given, configs, strict=True)
        ]
        resize, crop = choose_size(models, names, resize, crop, whole)
        chosen = tuple(metric for metric in METRICS if metric in metrics)
        settings = EvaluateConfig(resize, crop, mode, seed, precision, chosen, ssim)
        folder = None if out is None else resolve_root(str(out))
        value_range = range_of(models[0], value_range)

        def open_images() -> JoinedSource:
            channels = models[0].config.in_channels
            source, folders = open_sources(
                roots,
                channels,
                include,
                exclude,
                max_pixels,
                range_of(models[0], value_range),
                pages,
            )
            if folder is not None:
                check_output_folder(folder, folders)
                check_outputs(
                    folder,
                    FILES,
                    source.files,
                    earlier=(RESULTS, UNFINISHED),
                    image_folders=folders,
                    overwrite=overwrite,
                )
            _ = source.fingerprint  # cached, so that it is sent to the other ranks
            return source

        source = ranks.on_rank_zero(open_images)  # once, so that all ranks divide the same images
        evaluator = Evaluator(models, names, source, settings, batch_size, lpips, inception)
        networks: dict[str, Any] = {}
        if lpips is not None:
            files = [None if file is None else str(file) for file in (lpips_features, lpips_heads)]
            networks["lpips"] = [lpips_net, *files]
        if inception is not None:
            networks["rfid"] = [None if fid_weights is None else str(fid_weights)]
        # everything the metrics depend on; device and batch size only affect rounding
        identity = {
            "command": "evaluate",
            "checkpoints": [
                [x if isinstance(x, str) else checkpoint_name(x), model_fingerprint(model)]
                for x, model in zip(given, models, strict=True)
            ],
            "names": names,
            "fast": fast,
            "compile": compile,
            "images": source.fingerprint,
            "modification_times": ranks.on_rank_zero(lambda: modification_times(source)),
            "max_pixels": max_pixels,
            "range": source.pixel_format.value_range,
            "pages": source.pixel_format.pages,
            **asdict(settings),
            **networks,
        }
        units = units_of(len(source), unit_size(len(source)))
        progress = stack.enter_context(
            Progress(
                folder or _temporary_folder(ranks, stack),
                identity,
                resume,
                ranks,
                overwrite=overwrite,
                files=lambda unit, record: (
                    [progress.path(unit, ".npy")] if inception and record["images"] else []
                ),
                finished=lambda: None if folder is None else read_identity(folder / RESULTS),
            )
        )
        _measure(evaluator, settings, source, units, progress, ranks, num_workers)
        ranks.gather(None)  # wait until all units are finished

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
                size=size_in_words(resize, crop),
                ssim=ssim,
            )
            if folder is not None:
                about = {
                    "heading": _heading(roots, settings, count, len(skipped)),
                    "images": [display_name(root) for root in roots],
                    "number": count,
                    "skipped": skipped,
                    "range": source.pixel_format.value_range,
                    "pages": source.pixel_format.pages,
                    **asdict(settings),
                    "lpips_net": result.lpips_net,
                    "versions": {"kl_vae": __version__, "torch": torch.__version__},
                    "identity": progress.identity,
                }
                about_models = [
                    {
                        "checkpoint": checkpoint_name(x),
                        "parameters": sum(parameter.numel() for parameter in model.parameters()),
                        "downsampling_factor": model.downsampling_factor,
                    }
                    for x, model in zip(given, models, strict=True)
                ]
                rows = rows_of(evaluations, lpips_net, ssim, result.size)
                write_files(
                    folder,
                    evaluations,
                    rows,
                    progress.read(len(units)),
                    source,
                    about=about,
                    about_models=about_models,
                )
            progress.close([] if folder is None else [folder / name for name in FILES])
            return result

        return ranks.on_rank_zero(finish)


def _temporary_folder(ranks: Ranks, stack: ExitStack) -> Path:
    """Create a folder for the records of all ranks on one machine, removed with `stack`."""
    return Path(
        ranks.on_rank_zero(
            lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="kl_vae-"))
        )
    )


def _broadcast_configs(
    configs: ConfigSource | None | Sequence[ConfigSource | None], number: int
) -> list[ConfigSource | None]:
    if configs is None or isinstance(configs, (str, Path, Mapping)):
        configs = [configs]
    configs = list(configs)
    if len(configs) not in (1, number):
        raise ValueError(
            f"configs: {len(configs)} for {number} checkpoints; give one for all checkpoints, or "
            "one per checkpoint"
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
    """Evaluate this rank's units."""
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
    return (
        f"{count} image{'' if count == 1 else 's'} of {', '.join(map(display_name, roots))}, "
        f"{size_in_words(config.resize, config.crop)}; {skipped} skipped; {config.precision}; the "
        f"{config.mode} of the posterior decoded."
    )


def choose_size(
    models: Sequence[AutoEncoderKL],
    names: Sequence[str],
    resize: int | None,
    crop: int | None,
    whole: bool,
) -> tuple[int | None, int | None]:
    """Return the resize and crop sizes, by default the resolution of the models.

    Args:
        models: models to compare.
        names: names of the models.
        resize: requested resize; None: the crop.
        crop: requested crop; None: the resolution of the models.
        whole: use whole images, resized only if `resize` is given.

    Raises:
        ValueError: the models cannot be compared, or the sizes contradict each other.
    """
    _check_equal("in_channels", models, names, "give checkpoints with equal in_channels")
    if whole and crop is not None:
        raise ValueError(f"crop={crop}: whole images are not cropped; give either crop or whole")
    if whole:
        return resize, None
    if crop is None:
        _check_equal("resolution", models, names, "give crop, or whole")
        crop = models[0].config.resolution
    check_crop_fits(crop if resize is None else resize, crop)
    return resize or crop, crop


def _check_equal(key: str, models: Sequence[AutoEncoderKL], names: Sequence[str], fix: str) -> None:
    values = [getattr(model.config, key) for model in models]
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise ValueError(f"{key}={values[0]} of {names[0]} and {value} of {name} differ; {fix}")


def _column_names(checkpoints: Sequence[Checkpoint], names: Sequence[str] | None) -> list[str]:
    """Return the given names of checkpoints or, if None, their `short_names`.

    Raises:
        ValueError: the number of names is wrong, or a name is unprintable or a duplicate.
    """
    chosen = short_names([*map(_path_of, checkpoints)]) if names is None else list(names)
    if len(chosen) != len(checkpoints):
        raise ValueError(
            f"names: {len(chosen)} for {len(checkpoints)} checkpoints; give one for each checkpoint"
        )
    for i, name in enumerate(chosen):
        if not name.strip() or not name.isprintable():
            raise ValueError(f"names: {name!r} is not printable; give printable characters")
        if name in chosen[:i]:
            raise ValueError(
                f"two checkpoints are named {name}; give names, one for each checkpoint, or remove "
                "one"
            )
    return chosen


def _path_of(checkpoint: Checkpoint) -> str:
    return "model" if isinstance(checkpoint, AutoEncoderKL) else str(checkpoint)


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """Return the part of each checkpoint's path that differs between the checkpoints.

    For `runs/a/checkpoints/last.pt` and `runs/b/checkpoints/last.pt` these are `a` and `b`. The
    name of a single checkpoint is its file or folder name. A common suffix is removed.
    """
    paths = [_parts(checkpoint) for checkpoint in checkpoints]
    while _all_agree(paths, 0):
        paths = [path[1:] for path in paths]
    while len(paths) > 1 and _all_agree(paths, -1):
        paths = [path[:-1] for path in paths]
    names = ["/".join(path) for path in paths]
    suffixes = {os.path.splitext(name)[1] for name in names}
    # a numeric suffix, as in version-1.5, is part of the name
    if len(suffixes) == 1 and (suffix := suffixes.pop())[1:].isalpha():
        names = [name.removesuffix(suffix) for name in names]
    return names


def _parts(checkpoint: str) -> list[str]:
    parts = [part for part in os.path.normpath(checkpoint).split(os.sep) if part]
    return parts or [checkpoint]


def _all_agree(paths: list[list[str]], position: int) -> bool:
    """Return whether all paths share this part and have other parts."""
    return min(map(len, paths)) > 1 and len({path[position] for path in paths}) == 1


class Evaluator:
    """Evaluator of units of images; the result of a unit does not depend on other units.

    Args:
        models: models on one device, in eval mode, with equal in_channels.
        names: names of the models.
        source: source of the images.
        config: settings of the evaluation.
        batch_size: number of images of equal size that are encoded at once.
        lpips: result of `load_lpips` if lpips is among the metrics.
        inception: result of `load_inception` if rfid is among the metrics.

    Raises:
        ValueError: a metric needs RGB images, and the images cannot be converted.
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
                    f"{metric}: its network needs RGB, and images of {source.channels} channels "
                    f"cannot be converted; remove {metric} from metrics"
                )
        self._models = list(zip(models, names, strict=True))
        self._source = source
        self._config = config
        self._batch_size = batch_size
        self._lpips = lpips
        self._inception = inception

    @torch.inference_mode()
    def unit(self, images: Iterable[LoadedImage]) -> tuple[Record, Tensor | None]:
        """Evaluate the images of a unit.

        Returns:
            The record; and, if rfid is requested, the Inception features of the images and of each
            model's reconstructions, [1 + models, images, d].

        Raises:
            ValueError: a reconstruction contains NaN or infinity in fp32.
        """
        sizes: list[list[int]] = []
        skipped: list[tuple[int, str]] = []
        model_records = [ModelRecord(model.latent_channels) for model, _ in self._models]
        features = []
        device = next(self._models[0][0].parameters()).device
        usable = _usable(images, skipped)
        batches = batches_of_a_size(usable, _size_of, self._batch_size, consecutive=True)
        for batch in batches:
            indices, x = [index for index, _ in batch], torch.stack([image for _, image in batch])
            sizes += [[index, *x.shape[2:]] for index in indices]
            saved = [_as_saved(x.to(device))]
            for (model, name), model_record in zip(self._models, model_records, strict=True):
                posterior, decoded = self._autoencode(model, name, indices, x)
                saved.append(_as_saved(decoded.to(device)))
                model_record.add(posterior, self._metrics(saved[0], saved[-1]))
            if self._inception is not None:
                features.append(torch.stack([self._inception(_rgb(x)) for x in saved]))
        models = [model_record.values() for model_record in model_records]
        record = {"images": sizes, "skipped": skipped, "models": models}
        return record, torch.cat(features, 1) if features else None

    def _autoencode(
        self, model: AutoEncoderKL, name: str, indices: Sequence[int], x: Tensor
    ) -> tuple[DiagonalGaussianDistribution, Tensor]:
        """Encode and decode images x [B, C, H, W]; return the posterior and the reconstructions."""
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
        """Compute metrics, [B] each, between images [B, C, H, W] as returned by `as_saved`."""
        data_range = (0.0, 255.0 if before.dtype == torch.uint8 else 1.0)
        metrics = {}
        if before.shape[2] * before.shape[3] > MEASURED_ON_DEVICE:
            before, after = before.cpu(), after.cpu()
        # PSNR is computed from the MSE, which is finite also for identical images
        of_variant = partial(ssim, variant=self._config.ssim)
        measures: dict[str, tuple[str, Callable[..., Tensor]]] = {
            "psnr": ("mse", mse),
            "ssim": ("ssim", of_variant),
            "ms_ssim": ("ms_ssim", ms_ssim),
        }
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
    """Apply `as_saved` to each image of a batch [B, C, H, W] in [-1, 1]."""
    return torch.stack([as_saved(image) for image in x])


def _rgb(saved: Tensor) -> Tensor:
    """Convert [B, C, H, W] to RGB [B, 3, H, W]: repeat grey, or drop the alpha channel."""
    return saved.expand(-1, 3, -1, -1) if saved.shape[1] == 1 else saved[:, :3]
