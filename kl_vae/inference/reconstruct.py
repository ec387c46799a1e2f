"""Reconstruct the images of folders, write them as files, and measure how close they are.

C channels, H and W the image's height and width.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from kl_vae.data import MAX_PIXELS, JoinedSource, Source, ValueRange, resolve_root, to_float
from kl_vae.inference.batches import Numbered, batches_of_a_size, latent_noise
from kl_vae.inference.coding import Reconstruction, reconstruct_batch
from kl_vae.inference.images import LoadedImage, loaded_units
from kl_vae.inference.load import checkpoint_name, connect_ranks, load_model_on, model_fingerprint
from kl_vae.inference.progress import Progress, read_identity, units_of
from kl_vae.inference.reconstruction_report import (
    RESERVED,
    SUMMARY,
    ImageMetrics,
    OutputFiles,
    ReconstructionResult,
    begin_report,
    write_report,
)
from kl_vae.inference.sources import as_roots, modification_times, open_sources, range_of
from kl_vae.inference.tiling import Mode, Tiling, check_tiling
from kl_vae.metrics.perceptual import load_lpips
from kl_vae.metrics.similarity import SSIM_VARIANTS, SSIMVariant, psnr, ssim
from kl_vae.model import AutoEncoderKL, padded_size
from kl_vae.runtime.device import PRECISIONS
from kl_vae.runtime.files import display_name
from kl_vae.runtime.memory import is_out_of_memory
from kl_vae.runtime.outputs import check_output_folder
from kl_vae.runtime.published_config import ConfigSource
from kl_vae.runtime.randomness import generator_for
from kl_vae.visual.image_files import (
    ImageFormat,
    as_saved,
    both_for_display,
    in_unit_range,
    save_thumbnail,
    write_image,
)

logger = logging.getLogger(__name__)

Perceptual = Callable[[Tensor, Tensor], Tensor]  # of x, y [B, 3, H, W] in [-1, 1], gives [B]

_LARGEST_UNIT, _SMALLEST_UNIT = 64, 8
_UNITS = 64  # at least, of large sources: so many that ranks end at about the same time

# larger images are compared on the CPU, which has more memory for float64 windows
MEASURED_ON_DEVICE = 2**22  # pixels


@dataclass(frozen=True)
class ReconstructConfig:
    """How images are reconstructed: arguments of `reconstruct`.

    Raises:
        ValueError: an impossible value.
    """

    resize: int | None = None
    crop: int | None = None
    mode: Literal["mode", "sample"] = "mode"
    seed: int = 0
    precision: str = "fp32"
    max_pixels: int = MAX_PIXELS
    batch_size: int = 8
    tiling: Tiling = field(default_factory=Tiling)
    ssim: SSIMVariant = "wang"

    def __post_init__(self) -> None:
        for key in ("resize", "crop", "max_pixels", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: give at least 1")
        choices = {"mode": ("mode", "sample"), "precision": PRECISIONS, "ssim": SSIM_VARIANTS}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r}: give one of {', '.join(allowed)}")


def reconstruct(
    checkpoint: str | Path | AutoEncoderKL,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    resize: int | None = None,
    crop: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange | None = None,
    pages: str | None = None,
    mode: Literal["mode", "sample"] = "mode",
    seed: int = 0,
    batch_size: int = 8,
    num_workers: int = 4,
    config: ConfigSource | None = None,
    ema: bool = True,
    device: str = "auto",
    precision: str = "fp32",
    tiling: Mode = "auto",
    tile: int = 512,
    overlap: int = 128,
    fast: str = "auto",
    compile: bool = False,
    format: Literal["png", "webp", "jpg"] = "png",
    quality: int | None = None,
    bits: Literal[8, 16] = 8,
    lpips: Literal["none", "vgg", "alex", "squeeze"] = "none",
    lpips_features: str | Path | None = None,
    lpips_heads: str | Path | None = None,
    ssim: SSIMVariant = "wang",
    grid_size: int = 8,
    gallery: bool = True,
    resume: bool = False,
    overwrite: bool = False,
) -> ReconstructionResult:
    """Reconstruct images into files, with metrics.csv, summary.json, comparison.png and a gallery.

    Under torchrun all ranks call this and share the work.

    Args:
        checkpoint: what `AutoEncoderKL.from_checkpoint` takes; or a model, which is put into eval
            mode and else left as it is, on its device (`config`, `ema`, `device`, `fast` and
            `compile` are about checkpoints).
        images: folders of images or tar shards, single files, or patterns of them.
        out: the folder to write.
        resize: short side that images are resized to first, in pixels; None: as they are.
        crop: side of the square that is then cut out of the middle; None: the whole image.
        include: patterns of the files of folders to take; none: all.
        exclude: patterns of the files of folders to leave out.
        max_pixels: larger images are skipped before they are decoded.
        value_range: stored values of black and white, as `data.range` of a config; None: as stated
            by the checkpoint, else auto.
        pages: what the pages of TIFF files are, as `data.pages` of a config.
        mode: decode the posterior's mode, or a sample of it.
        seed: of the samples; each also depends on its image's key.
        batch_size: images of one size that a process reconstructs at once.
        num_workers: processes that decode images, for each process that reconstructs.
        config: a config (a file, a shipped name, or keys); None: as the checkpoint says.
        ema: load the moving average of the weights, where the checkpoint has one.
        device: auto, cuda, cuda:N, mps or cpu.
        precision: fp32, bf16 or fp16; what is not finite is computed again in fp32.
        tiling: auto, whole, exact or blend; see `Tiling`.
        tile: side of the tiles of blend, in pixels.
        overlap: pixels that neighbouring tiles of blend share at least.
        fast: auto, exact or off; see `accelerate_as`.
        compile: use `torch.compile`.
        format: of the reconstructions; they are measured before a lossy format.
        quality: of webp (None: 95; 100: lossless) and jpg (None: 90), up to 100.
        bits: per channel of png files; metrics are those of 8 bits.
        lpips: the network of LPIPS; none: it is not measured.
        lpips_features: file of the network's weights; None: torchvision's, downloaded once.
        lpips_heads: file of the linear heads; None: the published ones, downloaded once.
        ssim: variant of SSIM: wang (Gaussian window) or skimage (the defaults of scikit-image), see
            `kl_vae.metrics.similarity.ssim`.
        grid_size: images in comparison.png, at most.
        gallery: write index.html and its images.
        resume: continue what is unfinished in `out`.
        overwrite: replace a result of other arguments, unfinished work and other files in `out`.

    Raises:
        ValueError: an argument is impossible or the images cannot be used; nothing has been
            written then, unless writing failed. Or `out` contains a result of other arguments, or
            another process writes to it.
        RunError: a rank or a data worker was lost.
    """
    settings = ReconstructConfig(
        resize=resize,
        crop=crop,
        mode=mode,
        seed=seed,
        precision=precision,
        max_pixels=max_pixels,
        batch_size=batch_size,
        tiling=Tiling(tiling, tile, overlap),
        ssim=ssim,
    )
    image_format = ImageFormat(format, quality, bits)
    if lpips == "none" and (lpips_features or lpips_heads):
        raise ValueError("lpips_features, lpips_heads: say of which lpips they are")
    folder = resolve_root(str(out))
    roots = as_roots(images)
    with connect_ranks([checkpoint], device) as ranks:
        model = load_model_on(ranks, checkpoint, config, ema, fast, compile)
        check_tiling(model, settings.tiling)
        perceptual = None
        if lpips != "none":
            if model.config.in_channels != 3:
                raise ValueError(
                    f"lpips={lpips}: compares images of 3 channels, and the model has "
                    f"{model.config.in_channels}; leave it out"
                )
            perceptual = load_lpips(lpips, lpips_features, lpips_heads, ranks.device)
        value_range = range_of(model, value_range)

        def open_images() -> tuple[JoinedSource, list[Path]]:
            channels = model.config.in_channels
            source, folders = open_sources(
                roots, channels, include, exclude, max_pixels, range_of(model, value_range), pages
            )
            check_output_folder(folder, folders)
            _ = source.fingerprint  # goes to the other ranks with it
            return source, folders

        source, folders = ranks.on_rank_zero(
            open_images
        )  # once, so that the ranks share out the same list
        files = OutputFiles.of(folder, source, image_format, gallery)
        units = units_of(len(source), unit_size(len(source)))
        about = {
            "checkpoint": checkpoint_name(checkpoint),
            "images": [display_name(root) for root in roots],
            "range": source.pixel_format.value_range,
            "pages": source.pixel_format.pages,
            **asdict(settings),
            "format": image_format.name,
            "quality": image_format.quality,
            "bits": image_format.bits,
            "fast": fast,
            "compile": compile,
            "lpips": lpips,
            "device": ranks.device.type,
        }
        identity = {
            **about,
            "weights": model_fingerprint(model),
            "source": source.fingerprint,
            "modification_times": ranks.on_rank_zero(lambda: modification_times(source)),
            "lpips_files": [file and str(file) for file in (lpips_features, lpips_heads)],
            "gallery": gallery,
        }
        ranks.on_rank_zero(lambda: files.prepare(source, folders, overwrite))
        progress = Progress(
            folder,
            identity,
            resume,
            ranks,
            overwrite=overwrite,
            files=lambda _, record: (
                folder / name for x in record["images"] for name in files.of_image(x["index"])
            ),
            finished=lambda: read_identity(folder / SUMMARY),
        )
        with progress:
            ranks.on_rank_zero(lambda: begin_report(files))
            loading = loaded_units(
                source, units, progress, ranks, resize=resize, crop=crop, num_workers=num_workers
            )
            with Background(num_workers) as background, loading as loaded:
                reconstructor = Reconstructor(
                    model, source, files, settings, perceptual, background
                )
                for unit, unit_images in loaded:
                    progress.write(unit, reconstructor.do(unit_images))
            ranks.gather(None)  # all units are done
            about["identity"] = progress.identity

            def finish() -> ReconstructionResult:
                records = progress.read(len(units))
                result = write_report(source, files, model.to_rgb, about, records, grid_size)
                progress.close(path for name in RESERVED if (path := folder / name).exists())
                return result

            return ranks.on_rank_zero(finish)


def unit_size(number: int) -> int:
    """Return how many of `number` images make a unit: few of few, for the ranks to share."""
    return max(_SMALLEST_UNIT, min(_LARGEST_UNIT, number // _UNITS))


class Background:
    """Threads that write files while the model computes; compression lets other threads run.

    Args:
        threads: how many; 0: the work is done at once, by the caller.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._most = 2 * threads
        self._pending: deque[Future[None]] = deque()

    def do(self, work: Callable[[], None]) -> None:
        """Have `work` done; wait where the threads are far behind.

        Raises:
            Exception: what earlier work raised.
        """
        if self._pool is None:
            work()
            return
        while len(self._pending) >= self._most:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(work))

    def finish(self) -> None:
        """Wait until all is done.

        Raises:
            Exception: what some work raised, the first of them.
        """
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> Background:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the threads; what has not been begun is left where there is an error."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=kind is not None)


class Reconstructor:
    """Reconstructs units of images: what is written and returned depends on the unit alone.

    But for the device, and for how much memory it has free where that does not suffice.

    Args:
        model: in eval mode.
        source: of the images.
        files: where the images go.
        config: how images are reconstructed.
        perceptual: measures LPIPS, if it is to be measured.
        background: where images are compressed.
    """

    def __init__(
        self,
        model: AutoEncoderKL,
        source: Source,
        files: OutputFiles,
        config: ReconstructConfig,
        perceptual: Perceptual | None,
        background: Background,
    ) -> None:
        self._model = model
        self._source = source
        self._files = files
        self._config = config
        self._perceptual = perceptual
        self._background = background

    def do(self, images: Iterable[LoadedImage]) -> dict[str, Any]:
        """Reconstruct a unit; when this returns its files are written.

        Returns:
            The unit's record: `images`, a dict of `ImageMetrics` each, and `skipped`, pairs of
            index and reason, both in the order of the indices.

        Raises:
            ValueError: a file cannot be written.
        """
        metrics: list[ImageMetrics] = []
        skipped: list[tuple[int, str]] = []
        usable = self._usable(images, skipped)
        size_of = partial(padded_size, factor=self._model.downsampling_factor)
        for batch in batches_of_a_size(usable, size_of, self._config.batch_size):
            results = self._reconstruct(batch)
            for (index, image), result in zip(batch, results, strict=True):
                if result.image is None:
                    self._skip(index, result.reason, skipped)
                else:
                    metrics.append(self._save(index, image, result.image, result.redone_in_fp32))
        self._background.finish()
        metrics.sort(key=lambda of_image: of_image.index)
        return {"images": [asdict(of_image) for of_image in metrics], "skipped": sorted(skipped)}

    def _usable(
        self, images: Iterable[LoadedImage], skipped: list[tuple[int, str]]
    ) -> Iterator[Numbered]:
        for loaded in images:
            if loaded.image is None:
                self._skip(loaded.index, loaded.reason, skipped)
                continue
            try:
                self._files.image_format.check_size(*loaded.image.shape[1:])
            except ValueError as error:
                self._skip(loaded.index, str(error), skipped)
                continue
            yield loaded.index, loaded.image

    def _skip(self, index: int, reason: str, skipped: list[tuple[int, str]]) -> None:
        skipped.append((index, reason))
        logger.warning("skipped %s: %s", self._source.name(index), reason)

    def _reconstruct(self, batch: list[Numbered]) -> list[Reconstruction]:
        config = self._config
        noise = None
        if config.mode == "sample":
            keys = [("reconstruct", config.seed, self._source.key(index)) for index, _ in batch]
            noise = [
                latent_noise(self._model, image, generator_for(*key))
                for (_, image), key in zip(batch, keys, strict=True)
            ]
        images = [image for _, image in batch]
        return reconstruct_batch(self._model, images, config.precision, noise, config.tiling)

    def _save(self, index: int, image: Tensor, decoded: Tensor, redone: bool) -> ImageMetrics:
        if redone:
            name, precision = self._source.name(index), self._config.precision
            logger.warning("%s: NaN or infinity in %s; redone in fp32", name, precision)
        before, after = as_saved(image), as_saved(decoded)
        metrics = measure(
            index,
            before.to(after.device),
            after,
            self._perceptual,
            redone,
            ssim_variant=self._config.ssim,
        )
        fine = in_unit_range(decoded).cpu() if self._files.image_format.bits == 16 else None
        self._background.do(partial(self._write, index, before, after.cpu(), fine))
        return metrics

    def _write(
        self, index: int, image: Tensor, reconstruction: Tensor, fine: Tensor | None
    ) -> None:
        files = self._files
        written = reconstruction if fine is None else fine
        write_image(files.out / files.outputs[index], written, files.image_format)
        if not files.gallery:
            return
        original, shown = both_for_display(image, reconstruction, self._model.to_rgb)
        save_thumbnail(files.out / files.thumbnail(index), original, shown)
        if files.shown(index) == files.outputs[index]:
            original = image
        else:  # arrays, which a page cannot show
            write_image(files.out / files.shown(index), shown)
        write_image(files.out / files.original(index), original)


@torch.inference_mode()
def measure(
    index: int,
    image: Tensor,
    reconstruction: Tensor,
    perceptual: Perceptual | None = None,
    redone_in_fp32: bool = False,
    ssim_variant: SSIMVariant = "wang",
) -> ImageMetrics:
    """Compare what `as_saved` gives of an image and of its reconstruction, each [C, H, W]."""
    height, width = image.shape[1:]
    x, y = image[None], reconstruction[None]
    if height * width > MEASURED_ON_DEVICE:
        x, y = x.cpu(), y.cpu()
    data_range = (0.0, 255.0 if x.dtype == torch.uint8 else 1.0)
    return ImageMetrics(
        index,
        width,
        height,
        psnr=_finite(psnr(x, y, data_range)),
        ssim=_finite(ssim(x, y, data_range, ssim_variant)),
        lpips=None if perceptual is None else _lpips(image, reconstruction, perceptual),
        redone_in_fp32=redone_in_fp32,
    )


def _lpips(image: Tensor, reconstruction: Tensor, perceptual: Perceptual) -> float | None:
    try:
        return _finite(perceptual(to_float(image[None]), to_float(reconstruction[None])))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
