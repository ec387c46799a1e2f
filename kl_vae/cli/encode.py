"""Encode a data set, on one process or with torchrun on several, and measure its latents."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kl_vae.cli.arguments import (
    add_image_arguments,
    add_model_arguments,
    not_negative,
    positive,
)

if TYPE_CHECKING:
    from kl_vae.data import ImageDataset
    from kl_vae.distributed.ranks import Ranks
    from kl_vae.inference.statistics import LatentSums
    from kl_vae.model import AutoEncoderKL

HELP = "encode a data set, to measure its latents' mean and standard deviation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    add_image_arguments(parser, resize="the crop", crop="the resolution of the model's config")
    parser.add_argument(
        "--statistics",
        required=True,
        metavar="FILE",
        help="write the weights here, as export does, with the latents' statistics in their config",
    )
    parser.add_argument(
        "--per-channel",
        action="store_true",
        help="normalise each channel by its own mean and std, instead of all by one",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="images that a process encodes at once (default: 8)",
    )
    parser.add_argument(
        "--num-workers",
        type=not_negative,
        default=4,
        metavar="N",
        help="processes that decode images, for each that encodes (default: 4)",
    )


def run(args: argparse.Namespace) -> int:
    """Encode the images; 1 if any was skipped, else 0.

    Raises:
        ValueError: what the user can mend; the file has not been written then.
        RunError: a rank was lost, or a data worker.
    """
    from kl_vae.distributed.ranks import connect
    from kl_vae.inference.load import load_model

    out = Path(args.statistics)
    with connect(args.device) as ranks:
        ranks.on_first(lambda: _check_new(out))
        model = load_model(args.checkpoint, args.config, ranks.device, ema=not args.no_ema)
        _check_same(args.checkpoint, model, ranks)
        dataset = _dataset(args, model, ranks)
        sums, skipped = _measure(args, model, dataset, ranks)
        if not sums.images:
            raise ValueError(
                f"none of the {skipped} images can be used, for the reasons above; "
                "give others to --images"
            )
        # the others wait: torchrun ends all ranks as soon as one ends with 1
        ranks.on_first(lambda: _write(args, model, sums, out))
    return 1 if skipped else 0


def _check_new(out: Path) -> None:
    """Raise ValueError unless `out` can become a new file: hours may pass before it is written."""
    if out.exists():
        raise ValueError(f"--statistics {out}: exists; name a file that does not")
    if not out.parent.is_dir():
        raise ValueError(f"--statistics {out}: no such folder: {out.parent}; create it")


def _check_same(checkpoint: str, model: AutoEncoderKL, ranks: Ranks) -> None:
    """Raise ValueError unless all ranks have read the same weights."""
    from kl_vae.distributed.agreement import checksums

    sums = checksums(model)
    if ranks.on_first(lambda: sums) != sums:
        raise ValueError(
            f"{checkpoint}: rank {ranks.rank} has read other weights than rank 0, since its run "
            "goes on; give one file of its checkpoints"
        )


def _dataset(args: argparse.Namespace, model: AutoEncoderKL, ranks: Ranks) -> ImageDataset:
    from kl_vae.data import FolderSource, ImageDataset
    from kl_vae.data.config import check_crop_fits
    from kl_vae.inference.sources import list_sources

    crop = args.crop or model.config.resolution
    f = model.downsampling_factor
    if crop % f:
        nearest = max(1, round(crop / f)) * f
        raise ValueError(f"crop={crop}: must be a multiple of {f}; give {nearest}")
    resize = args.resize or crop
    check_crop_fits(resize, crop)
    channels = model.config.in_channels
    # once, so that the ranks share out the same list
    sources, _ = ranks.on_first(
        lambda: list_sources(args.images, channels, args.include, args.exclude)
    )
    paths = [str(source.path) for source in sources]  # relative to the working directory
    source = FolderSource(Path(), paths, channels, args.max_pixels)
    return ImageDataset(source, crop, resize, flip=False, seed=0, training=False)


def _measure(
    args: argparse.Namespace, model: AutoEncoderKL, dataset: ImageDataset, ranks: Ranks
) -> tuple[LatentSums, int]:
    """The sums over the images of all ranks, each once, and how many were skipped."""
    import torch
    from tqdm import tqdm

    from kl_vae.data import batch_loader, validation_batches
    from kl_vae.inference.statistics import LatentSums, latent_sums

    sums, skipped = LatentSums.of_nothing(model.latent_channels), 0
    keys = validation_batches(len(dataset), args.batch_size, ranks.rank, ranks.world_size)
    pin_memory = ranks.device.type == "cuda"
    # a slow disk is waited for
    share = iter(batch_loader(dataset, keys, args.num_workers, pin_memory, timeout_seconds=0))
    hidden = None if ranks.is_first else True  # None: no bar where stderr is a file
    with tqdm(total=len(dataset), unit="image", disable=hidden) as progress:
        while True:
            batch = next(share, None)
            # all ranks together: one has a batch more than another, and none outruns a failed one
            read = int(ranks.sum(torch.tensor(0 if batch is None else len(batch.names))))
            if not read:
                break
            if batch is not None:
                for image in batch.bad:
                    tqdm.write(f"skipped {image.name}: {image.reason}", file=sys.stderr)
                skipped += len(batch.bad)
                batch = batch.usable()
                if batch.names:
                    sums = sums.merge(latent_sums(model, batch, args.precision))
            progress.update(read)
    of_ranks = ranks.gather((sums, skipped))
    total = LatentSums.of_nothing(model.latent_channels)
    for of_rank, _ in of_ranks:
        total = total.merge(of_rank)
    return total, sum(number for _, number in of_ranks)


def _write(args: argparse.Namespace, model: AutoEncoderKL, sums: LatentSums, out: Path) -> None:
    """Print the statistics, then write them with the weights."""
    from kl_vae.data import display_name
    from kl_vae.pretrained import write_export

    model.latents = latents = sums.normalization(args.per_channel)
    lines = [
        f"{sums.images:,} images, {len(sums.mean)} channels: scale_factor "
        f"{latents.scale_factor:.4g}, shift_factor {latents.shift_factor:.4g}",
        f"channel {'mean':>10} {'std':>10}",
    ]
    for channel, (mean, std) in enumerate(zip(sums.mean, sums.std, strict=True)):
        lines.append(f"{channel:>7} {mean:>10.4g} {std:>10.4g}")
    # at once: what is measured is not lost if the file cannot be written
    print("\n".join(lines), flush=True)
    write_export(out, {key: x.cpu() for key, x in model.state_dict().items()}, model.params)
    print(f"the weights and these statistics are in {display_name(out)}", flush=True)
