"""The arguments that several commands share."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

CHECKPOINT = "a run directory, a checkpoint of any layout, a folder of diffusers', or hf://ORG/NAME"


def keywords(function: Callable[..., Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `function` that were given under its own names.

    What was left out (None) keeps the function's default.
    """
    names = inspect.signature(function).parameters
    return {key: value for key, value in vars(args).items() if key in names and value is not None}


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose weights."""
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_FILE", help=CHECKPOINT)
    add_weights_arguments(parser)


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how a checkpoint is read."""
    add_no_ema_argument(parser)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config file or shipped config's name; without it, as the checkpoint says or shows",
    )


def add_no_ema_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that leaves the moving average of the weights out."""
    parser.add_argument(
        "--no-ema",
        dest="ema",
        action="store_false",
        help="the weights as trained last, where a checkpoint has their moving average as well",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that uses a model."""
    add_checkpoint_arguments(parser)
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where and how a model computes."""
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cuda:N, mps or cpu")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32"
    )
    parser.add_argument(
        "--fast",
        choices=("auto", "exact", "off"),
        default="auto",
        help="auto (default): all fast variants of the device, equal to rounding; exact: without "
        "Winograd's convolutions (CPUs, fp32), which round more; off: the plain modules",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the model: minutes at first, for many images of one size on a GPU",
    )


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that write pictures."""
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the pictures go; is created"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def add_image_arguments(
    parser: argparse.ArgumentParser,
    resize: str = "as they are",
    crop: str = "the whole image",
) -> None:
    """Add the arguments that choose images; `resize` and `crop` say what is done without them."""
    parser.add_argument(
        "--images",
        required=True,
        nargs="+",
        metavar="FOLDER_OR_FILE",
        help="folders (also package:NAME/FOLDER) of images or .tar shards, single images, single "
        "shards, or patterns of them",
    )
    parser.add_argument(
        "--resize",
        type=positive,
        metavar="N",
        help=f"resize images to this short side first (default: {resize})",
    )
    parser.add_argument(
        "--crop",
        type=positive,
        metavar="N",
        help=f"then cut this square out of the middle (default: {crop})",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="take these files of folders only",
    )
    parser.add_argument(
        "--exclude", nargs="+", default=(), metavar="PATTERN", help="leave these files out"
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="skip images with more pixels, before they are decoded (default: 178956970)",
    )


def add_work_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the arguments of commands over many images; `verb` says what a process does with one."""
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help=f"images that a process {verb} at once (default: 8)",
    )
    parser.add_argument(
        "--num-workers",
        type=not_negative,
        default=4,
        metavar="N",
        help=f"processes that decode images, for each that {verb} them (default: 4)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue where the same command was ended before"
    )


def add_mode_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that says what of the posterior is decoded."""
    parser.add_argument(
        "--mode",
        choices=("mode", "sample"),
        default="mode",
        help="decode the posterior's mode (default) or a sample of it",
    )


def add_lpips_files(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the files of LPIPS."""
    for name, what in (("features", "network's weights"), ("heads", "linear heads")):
        parser.add_argument(
            f"--lpips-{name}",
            metavar="FILE",
            help=f"the {what}, instead of the published ones, which are downloaded once",
        )


def add_tiling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is done with images that are large for the memory."""
    parser.add_argument(
        "--tiling",
        choices=("auto", "whole", "exact", "blend"),
        default="auto",
        help="whole; exact: in strips, which changes nothing; blend: in tiles that overlap, which "
        "takes least memory and changes colours slightly; auto (default): the first for which "
        "there is memory",
    )
    parser.add_argument(
        "--tile",
        type=positive,
        default=512,
        metavar="N",
        help="side of the tiles of blend (default: 512)",
    )
    parser.add_argument(
        "--overlap",
        type=not_negative,
        default=128,
        metavar="N",
        help="pixels that neighbours of them share at least (default: 128)",
    )


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _integer(text, 1)


def not_negative(text: str) -> int:
    """Parse an integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, smallest: int) -> int:
    number = int(text) if text.isdecimal() else -1
    if number < smallest:
        raise argparse.ArgumentTypeError(f"{text!r}: give an integer of at least {smallest}")
    return number
