"""Encode a data set into latents, measure them, or both; on one process or many, with torchrun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kl_vae.cli.arguments import add_image_arguments, add_model_arguments, add_work_arguments
from kl_vae.cli.encode_arguments import (
    OF_FOLDER,
    add_folder_arguments,
    add_statistics_arguments,
    check_together,
)

if TYPE_CHECKING:
    from kl_vae.data import BadImage, ImageDataset
    from kl_vae.data.latent_index import LatentIndex
    from kl_vae.inference.encoding.latent_shards import OnBatch
    from kl_vae.inference.statistics import LatentSums
    from kl_vae.model import AutoEncoderKL
    from kl_vae.runtime.distributed import Ranks

HELP = "encode a data set into files of latents, or to measure their mean and standard deviation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    add_image_arguments(parser, resize="the crop", crop="the resolution of the model's config")
    add_work_arguments(parser, "encodes")
    add_statistics_arguments(parser)
    add_folder_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Encode the images; 1 if any was skipped, else 0.

    Raises:
        ValueError: what the user can mend; of latents what was done is kept for --resume, and the
            file of statistics has not been written.
        RunError: a rank was lost, or a data worker.
    """
    from kl_vae.inference.load import load_model_on
    from kl_vae.runtime.distributed import COMMAND, connect

    check_together(args)
    with connect(args.device, timeout_seconds=86_400, mends=COMMAND) as ranks:
        if args.statistics is not None:
            ranks.on_first(lambda: _check_new(Path(args.statistics), args.resume))
        model = load_model_on(
            ranks, args.checkpoint, args.config, not args.no_ema, args.fast, args.compile
        )
        dataset = _dataset(args, model, ranks)
        last_line = ""
        if args.out is None:
            sums, skipped = _measure(args, model, dataset, ranks)
        else:
            index, sums, complete = _encode(args, model, dataset, ranks)
            skipped, last_line = index.skipped, _summary(args.out, index, complete)
        # the others wait: torchrun ends all ranks as soon as one ends with 1
        ranks.on_first(lambda: _report(args, model, sums, last_line))
    return 1 if skipped else 0


def _check_new(out: Path, resume: bool) -> None:
    """Raise ValueError unless `out` can become a new file: hours may pass before it is written."""
    if out.exists() and not resume:
        raise ValueError(f"--statistics {out}: exists; name a file that does not")
    if not out.parent.is_dir():
        raise ValueError(f"--statistics {out}: no such folder: {out.parent}; create it")


def _dataset(args: argparse.Namespace, model: AutoEncoderKL, ranks: Ranks) -> ImageDataset:
    from kl_vae.data import ImageDataset
    from kl_vae.data.config import check_crop_fits
    from kl_vae.inference.sources import open_sources

    crop = args.crop or model.config.resolution
    f = model.downsampling_factor
    if crop % f:
        nearest = max(1, round(crop / f)) * f
        raise ValueError(f"crop={crop}: must be a multiple of {f}; give {nearest}")
    resize = args.resize or crop
    check_crop_fits(resize, crop)
    channels = model.config.in_channels
    # once, so that the ranks share out the same list
    source, _ = ranks.on_first(
        lambda: open_sources(args.images, channels, args.include, args.exclude, args.max_pixels)
    )
    return ImageDataset(source, crop, resize, flip=False, seed=0, training=False)


def _measure(
    args: argparse.Namespace, model: AutoEncoderKL, dataset: ImageDataset, ranks: Ranks
) -> tuple[LatentSums, int]:
    from kl_vae.inference.encoding.measure import measure_latents

    with _progress(len(dataset), ranks) as on_batch:
        return measure_latents(
            model, dataset, ranks, on_batch, args.batch_size, args.num_workers, args.precision
        )


def _encode(
    args: argparse.Namespace, model: AutoEncoderKL, dataset: ImageDataset, ranks: Ranks
) -> tuple[LatentIndex, LatentSums, bool]:
    from kl_vae.data import resolve_root
    from kl_vae.inference.encoding.encode import LatentEncoding
    from kl_vae.inference.encoding.stored_latents import EncodeConfig
    from kl_vae.runtime.files import display_name

    keys = (*OF_FOLDER, "batch_size", "num_workers", "precision")
    given: dict[str, Any] = {key: getattr(args, key) for key in keys}
    config = EncodeConfig(**{key: value for key, value in given.items() if value is not None})
    out, checkpoint = resolve_root(args.out), display_name(args.checkpoint)
    work = LatentEncoding(model, dataset, out, config, ranks, checkpoint, args.resume)
    with _progress(work.images, ranks, own=True) as on_batch:
        work.run(on_batch)
    return *work.finish(), work.complete


@contextmanager
def _progress(total: int, ranks: Ranks, own: bool = False) -> Iterator[OnBatch]:
    """A bar of images on rank 0; `own`: it is of that rank's part."""
    from tqdm import tqdm

    hidden = None if ranks.is_first else True  # None: no bar where stderr is a file
    title = f"rank 0 of {ranks.world_size}" if own and ranks.world_size > 1 else None
    with tqdm(total=total, unit="image", desc=title, disable=hidden) as bar:

        def on_batch(read: int, bad: Sequence[BadImage]) -> None:
            for image in bad:
                tqdm.write(f"skipped {image.name}: {image.reason}", file=sys.stderr)
            bar.update(read)

        yield on_batch


def _summary(out: str, index: LatentIndex, complete: bool) -> str:
    from kl_vae.runtime.files import display_name

    size = sum(shard.bytes for shard in index.shards) / 1e6
    skipped = f", {index.skipped:,} skipped" if index.skipped else ""
    number = len(index.shards)
    return (
        f"{index.number:,} images in {number:,} shard{'s' * (number > 1)} ({size:.1f} MB) in "
        f"{display_name(out)}: scale_factor {index.statistics.scale_factor:.4g}{skipped}"
        f"{'; complete, verified' if complete else ''}"
    )


def _report(args: argparse.Namespace, model: AutoEncoderKL, sums: LatentSums, last: str) -> None:
    """Print and write the statistics, where they are asked for, then print the last line."""
    if args.statistics is not None:
        _write_statistics(model, sums, Path(args.statistics), args.per_channel)
    if last:
        print(last, flush=True)


def _write_statistics(model: AutoEncoderKL, sums: LatentSums, out: Path, per_channel: bool) -> None:
    from kl_vae.checkpoints.pretrained import write_export
    from kl_vae.runtime.files import display_name

    model.latents = latents = sums.normalization(per_channel)
    lines = [
        f"{sums.images:,} images, {len(sums.mean)} channels: scale_factor "
        f"{latents.scale_factor:.4g}, shift_factor {latents.shift_factor:.4g}",
        f"channel {'mean':>10} {'std':>10}",
    ]
    for channel, (mean, std) in enumerate(zip(sums.mean, sums.std, strict=True)):
        lines.append(f"{channel:>7} {mean:>10.4g} {std:>10.4g}")
    # at once: what is measured is not lost if the file cannot be written
    print("\n".join(lines), flush=True)
    if out.exists():  # only with --resume: the same command has written it before
        print(f"{display_name(out)} exists and is left as it is", flush=True)
        return
    write_export(out, {key: x.cpu() for key, x in model.state_dict().items()}, model.params)
    print(f"the weights and these statistics are in {display_name(out)}", flush=True)
