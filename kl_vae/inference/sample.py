"""Sampling: decode latents from the prior, from interpolations or from posteriors into files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kl_vae.data import MAX_PIXELS, JoinedSource, ValueRange, resolve_root
from kl_vae.inference.encode import check_size
from kl_vae.inference.latent_folder import nothing_usable
from kl_vae.inference.load import connect_ranks, load_model_on, model_fingerprint
from kl_vae.inference.progress import UNFINISHED, Progress, show_progress
from kl_vae.inference.sampled_images import (
    GRID,
    Canvas,
    PosteriorImages,
    SampledImages,
    interpolated_images,
    prior_images,
    read_grid_identity,
)
from kl_vae.inference.sources import as_roots, modification_times, open_sources, range_of
from kl_vae.inference.tiling import Tiling
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.outputs import check_output_folder, check_outputs
from kl_vae.runtime.published_config import ConfigSource

Origin = Literal["prior", "interpolation", "posterior"]


@dataclass(frozen=True)
class SamplingResult:
    """Result of `sample`, over all ranks.

    Attributes:
        folder: the output folder.
        files: names of the images, in order; grid.png shows the first ones.
        shown: number of images in grid.png.
        skipped: number of unusable images; a warning names each of them.
        posterior_std: for `origin="posterior"`, mean, smallest and largest standard deviation of
            the posteriors per latent channel, over all images and positions; otherwise empty.
    """

    folder: Path
    files: tuple[str, ...]
    shown: int
    skipped: int
    posterior_std: dict[str, list[float]]


def sample(
    checkpoint: str | Path | AutoEncoderKL,
    out: str | Path,
    *,
    origin: Origin = "prior",
    number: int = 16,
    size: int | None = None,
    images: str | Path | Sequence[str | Path] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange | None = None,
    pages: str | None = None,
    steps: int = 9,
    linear: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    num_workers: int = 4,
    config: ConfigSource | None = None,
    ema: bool = True,
    device: str = "auto",
    precision: str = "fp32",
    tiling: Literal["auto", "whole", "exact", "blend"] = "auto",
    tile: int = 512,
    overlap: int = 128,
    fast: str = "auto",
    compile: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> SamplingResult:
    """Decode latents into image files and a grid.png.

    Under torchrun all ranks call this and share the work.

    Args:
        checkpoint: a checkpoint accepted by `AutoEncoderKL.from_checkpoint`, or a model. A model
            is switched to eval mode and stays on its device; `config`, `ema`, `device`, `fast` and
            `compile` do not apply to it.
        out: output folder.
        origin: source of the latents: the prior N(0, I), interpolation between images, or samples
            from the posterior of each image.
        number: number of images to sample; for `posterior`, per image.
        size: side of the images in pixels; None: the resolution in the model's config.
        images: images for `interpolation` (the first two of a folder) and `posterior`: folders of
            images or tar shards, single files, or glob patterns.
        include: glob patterns of files in folders to include; empty: all files.
        exclude: glob patterns of files in folders to exclude.
        max_pixels: larger images are rejected before decoding.
        value_range: stored values of black and white, as `data.range` of a config; None: as stated
            by the checkpoint, else auto.
        pages: what the pages of TIFF files are, as `data.pages` of a config.
        steps: for `interpolation`, number of images per pair, both ends included.
        linear: for `interpolation`, use linear (lerp) instead of spherical interpolation (slerp).
        seed: random seed; each image depends on the seed and its own number only.
        batch_size: number of images that each process decodes at once.
        num_workers: number of image loading processes per rank.
        config: a config (a file, a shipped name, or keys); None: taken from the checkpoint.
        ema: load the EMA weights if the checkpoint has them.
        device: auto, cuda, cuda:N, mps or cpu.
        precision: fp32, bf16 or fp16; non-finite results are recomputed in fp32.
        tiling: auto, whole, exact or blend; see `Tiling`.
        tile: for `blend`, side of a tile in pixels.
        overlap: for `blend`, minimum overlap of neighbouring tiles in pixels.
        fast: auto, exact or off; see `accelerate_as`.
        compile: use `torch.compile`.
        resume: continue unfinished work in `out`.
        overwrite: replace a result of other arguments, unfinished work and other files in `out`.

    Raises:
        ValueError: an argument is invalid or the images are unusable; images that were already
            written are kept for `resume`. Or `out` contains a result of other arguments, or another
            process writes to it.
        RunError: a rank was lost.
    """
    if origin not in get_args(Origin):
        raise ValueError(f"origin={origin!r}: give one of {', '.join(get_args(Origin))}")
    roots = as_roots(images)
    if bool(roots) != (origin != "prior"):
        problem = "prior does not use images" if roots else f"{origin} requires images"
        raise ValueError(f"images={roots}: {problem}; {'remove' if roots else 'give'} images")
    tiling_config = Tiling(tiling, tile, overlap)
    folder = resolve_root(str(out))
    with connect_ranks([checkpoint], device) as ranks:
        ranks.on_rank_zero(lambda: check_output_folder(folder))
        model = load_model_on(ranks, checkpoint, config, ema, fast, compile)
        size = model.config.resolution if size is None else size
        check_size(size, model.downsampling_factor)
        value_range = range_of(model, value_range)

        def open_images(roots: Sequence[str]) -> tuple[JoinedSource, list[Path]]:
            channels = model.config.in_channels
            # list the files once, on rank 0
            return ranks.on_rank_zero(
                lambda: open_sources(
                    roots, channels, include, exclude, max_pixels, value_range, pages
                )
            )

        canvas = Canvas(model, folder, size, precision, tiling_config, batch_size)
        opened: list[tuple[JoinedSource, list[Path]]] = []
        work: SampledImages
        if origin == "prior":
            work = prior_images(canvas, number, seed)
        elif origin == "interpolation":
            opened = [open_images([root]) for root in roots]
            sources = [source for source, _ in opened]
            work = interpolated_images(canvas, sources, steps=steps, linear=linear)
        else:
            opened = [open_images(roots)]
            work = PosteriorImages(canvas, opened[0][0], number, seed, num_workers)
        ranks.on_rank_zero(lambda: _check_outputs(work, folder, opened, overwrite))
        identity = {
            "from": origin,
            "seed": seed,
            "batch_size": batch_size,
            "precision": precision,
            "fast": fast,
            "compile": compile,
            "tiling": tiling,
            "tile": tile,
            "overlap": overlap,
            "model": model_fingerprint(model),
            "size": size,
            "range": value_range if roots else None,
            "pages": pages,
            "max_pixels": max_pixels,
            "modification_times": ranks.on_rank_zero(
                lambda: [modification_times(x) for x, _ in opened]
            ),
            **work.identity,
        }
        progress = Progress(
            folder,
            identity,
            resume,
            ranks,
            overwrite=overwrite,
            files=lambda unit, record: (
                [] if "skipped" in record else [folder / file for file in work.units[unit]]
            ),
            finished=lambda: read_grid_identity(folder / GRID),
        )
        with progress:
            return _draw(work, folder, progress, ranks)


def _check_outputs(
    work: SampledImages,
    out: Path,
    opened: Sequence[tuple[JoinedSource, list[Path]]],
    overwrite: bool,
) -> None:
    """Check that no input file or unrelated file would be overwritten."""
    image_folders = [folder for _, folders in opened for folder in folders]
    check_output_folder(out, image_folders)
    inputs = [file for source, _ in opened for file in source.files]
    files = [file for unit in work.units for file in unit]
    check_outputs(
        out,
        [*work.others, *files, GRID],
        inputs,
        earlier=(GRID, UNFINISHED),
        image_folders=image_folders,
        overwrite=overwrite,
    )


def _draw(work: SampledImages, out: Path, progress: Progress, ranks: Ranks) -> SamplingResult:
    """Draw this rank's units, wait for the other ranks, and finish on rank 0."""
    own = progress.share(len(work.units))
    with show_progress(sum(len(work.units[unit]) for unit in own), ranks) as update:
        for unit, record in zip(own, work.draw(own), strict=True):
            progress.write(unit, record)
            update(len(work.units[unit]))
    ranks.gather(None)  # all units are drawn

    def finish() -> SamplingResult:
        records = list(progress.read(len(work.units)))
        drawn = [unit for unit, record in enumerate(records) if "skipped" not in record]
        if not drawn:
            progress.close()
            raise nothing_usable(len(records))
        shown = work.finish(records, progress.identity)
        progress.close(out / file for file in [*work.others, GRID])
        return SamplingResult(
            folder=out,
            files=tuple(file for unit in drawn for file in work.units[unit]),
            shown=shown,
            skipped=len(records) - len(drawn),
            posterior_std=_summarize(
                [record["posterior_std"] for record in records if "posterior_std" in record]
            ),
        )

    return ranks.on_rank_zero(finish)


def _summarize(images: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Return the mean, smallest and largest value per channel over all images."""
    if not images:
        return {}

    def over(key: str) -> list[tuple[float, ...]]:
        return list(zip(*(image[key] for image in images), strict=True))

    return {
        "mean": [sum(values) / len(values) for values in over("mean")],
        "smallest": [min(values) for values in over("smallest")],
        "largest": [max(values) for values in over("largest")],
    }
