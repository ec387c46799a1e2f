"""Encode a data set into latents, measure them, or both; on one process or many, with torchrun."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from kl_vae.cli.arguments import (
    add_image_arguments,
    add_model_arguments,
    add_work_arguments,
    keywords,
    positive,
)

if TYPE_CHECKING:
    from kl_vae.inference.encode import EncodingResult

HELP = "encode a data set into files of latents, or to measure their mean and standard deviation"

# about the folder of latents; None where left out: the default of `encode_dataset`
OF_FOLDER = ("what", "normalize", "flip", "dtype", "shard_size", "labels", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    add_image_arguments(parser, resize="the crop", crop="the resolution of the model's config")
    add_work_arguments(parser, "encodes")
    parser.add_argument(
        "--statistics",
        metavar="FILE",
        help="write the weights here, as export does, with the latents' statistics in their config",
    )
    parser.add_argument(
        "--per-channel",
        action="store_true",
        help="in FILE normalise each channel by its own mean and std, instead of all by one",
    )
    group = parser.add_argument_group("files of latents")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="write the latents here, in safetensors files beside index.json; is created",
    )
    group.add_argument(
        "--what",
        choices=("moments", "sample", "mode"),
        help="of the posterior: mean and log variance (default), a sample, or the mean alone",
    )
    group.add_argument(
        "--normalize",
        action="store_true",
        default=None,
        help="shifted and scaled for a diffusion model (default: raw, as decode takes them)",
    )
    group.add_argument(
        "--flip", action="store_true", default=None, help="encode the mirrored images as well"
    )
    group.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="of what is stored (default: fp16)"
    )
    group.add_argument(
        "--shard-size", type=positive, metavar="N", help="images per file (default: 1024)"
    )
    group.add_argument(
        "--labels",
        action="store_true",
        default=None,
        help="store classes: each image's own label, or the first folder that it lies in",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of samples (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Call `kl_vae.encode_dataset` and print its result; return 1 if an image was skipped, else 0.

    Raises:
        ValueError: what the user can fix.
        RunError: a rank or a data worker was lost.
    """
    from kl_vae.inference.encode import encode_dataset

    _check_together(args)
    result = encode_dataset(**keywords(encode_dataset, args))
    if os.environ.get("RANK", "0") != "0":
        return 0  # torchrun would end rank 0 while it prints
    if args.statistics is not None:
        _print_statistics(result, args.statistics)
    if args.out is not None:
        _print_folder(result, args.out)
    return 1 if result.skipped else 0


def _check_together(args: argparse.Namespace) -> None:
    if args.out is None and args.statistics is None:
        raise ValueError("nothing to write: give --out FOLDER, --statistics FILE, or both")
    if args.out is None:
        for key in (*OF_FOLDER, "resume"):
            given = getattr(args, key)
            if given is not None and given is not False:  # a seed of 0 is given
                option = f"--{key.replace('_', '-')}"
                raise ValueError(f"{option}: is about files of latents; give --out FOLDER, too")
    elif args.per_channel and args.statistics is None:
        raise ValueError("--per-channel: is about the file of statistics; give --statistics FILE")


def _print_statistics(result: EncodingResult, file: str) -> None:
    from kl_vae.runtime.files import display_name

    latents, name = result.latents, display_name(file)
    assert latents.mean is not None and latents.std is not None
    print(
        f"{result.images:,} images, {len(latents.mean)} channels: scale_factor "
        f"{latents.scale_factor:.4g}, shift_factor {latents.shift_factor:.4g}"
    )
    print(f"channel {'mean':>10} {'std':>10}")
    for channel, (mean, std) in enumerate(zip(latents.mean, latents.std, strict=True)):
        print(f"{channel:>7} {mean:>10.4g} {std:>10.4g}")
    if result.exported:
        print(f"the weights and these statistics are in {name}", flush=True)
    else:
        print(f"{name} exists and is left as it is", flush=True)


def _print_folder(result: EncodingResult, folder: str) -> None:
    from kl_vae.runtime.files import display_name

    index = result.index
    assert index is not None
    number = len(index.shards)
    skipped = f", {index.skipped:,} skipped" if index.skipped else ""
    verified = "; complete, verified" if result.verified else ""
    print(
        f"{index.number:,} images in {number:,} shard{'s' * (number > 1)} "
        f"({index.bytes / 1e6:.1f} MB) in {display_name(folder)}: scale_factor "
        f"{index.statistics.scale_factor:.4g}{skipped}{verified}",
        flush=True,
    )
