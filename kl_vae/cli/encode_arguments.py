"""The arguments that say what `kl-vae encode` writes."""

from __future__ import annotations

import argparse

from kl_vae.cli.arguments import positive

# what a folder of latents is made by; left out, as `EncodeConfig` says
OF_FOLDER = ("what", "normalize", "flip", "dtype", "shard_size", "labels", "seed")


def add_statistics_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the file of statistics."""
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


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a folder of latents."""
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
        "--shard-size", type=positive, metavar="N", help="images a file (default: 1024)"
    )
    group.add_argument(
        "--labels",
        action="store_true",
        default=None,
        help="store classes: each image's own label, or the first folder that it lies in",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of samples (default: 0)")


def check_together(args: argparse.Namespace) -> None:
    """Raise ValueError where arguments do not go together."""
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
