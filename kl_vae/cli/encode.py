"""Encode a data set into latents, measure their statistics, or both. Also runs under torchrun."""

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

HELP = "encode a data set into latents on disk, or measure their mean and standard deviation"

# options of the latents folder; None keeps the default of `encode_dataset`
OF_FOLDER = ("what", "normalize", "flip", "dtype", "shard_size", "labels", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    add_image_arguments(parser, resize="the crop", crop="the resolution of the model's config")
    add_work_arguments(parser, "encodes")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="with --resume: compare the content of all images with what was encoded (default: "
        "their sizes and modification times)",
    )
    parser.add_argument(
        "--statistics",
        metavar="FILE",
        help="write the weights together with the statistics of the latents to this .pt file",
    )
    parser.add_argument(
        "--per-channel",
        action="store_true",
        help="with --statistics: mean and standard deviation per channel",
    )
    group = parser.add_argument_group("latents on disk")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="output folder for the latents (safetensors shards and index.json), created if needed",
    )
    group.add_argument(
        "--what",
        choices=("moments", "sample", "mode"),
        help="what to store: moments (mean and log variance, default), a sample, or the mode",
    )
    group.add_argument(
        "--normalize",
        action="store_true",
        default=None,
        help="store normalized latents, as diffusion models expect (default: raw, as decode takes)",
    )
    group.add_argument(
        "--flip", action="store_true", default=None, help="also encode the mirrored images"
    )
    group.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="data type on disk (default: fp16)"
    )
    group.add_argument(
        "--shard-size", type=positive, metavar="N", help="images per shard (default: 1024)"
    )
    group.add_argument(
        "--labels",
        action="store_true",
        default=None,
        help="store a class per image: its label in a tar shard, else its first folder",
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of samples (default: 0)")


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
        for key in (*OF_FOLDER, "resume", "verify"):
            given = getattr(args, key)
            if given is not None and given is not False:  # a seed of 0 is given
                option = f"--{key.replace('_', '-')}"
                raise ValueError(f"{option}: needs --out FOLDER")
    elif args.verify and not args.resume:
        raise ValueError("--verify: compares existing latents with their images; give --resume")
    elif args.per_channel and args.statistics is None:
        raise ValueError("--per-channel: applies to --statistics; give --statistics FILE")


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
        print(f"{name} exists and was not changed", flush=True)


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
