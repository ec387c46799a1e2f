"""The arguments that several commands share."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

CHECKPOINT = "a run directory, a checkpoint of any layout, a diffusers folder, or hf://ORG/NAME"


def keywords(function: Callable[..., Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `function` that were given under its own names.

    Arguments that were not given (None) keep the function's default.
    """
    names = inspect.signature(function).parameters
    return {key: value for key, value in vars(args).items() if key in names and value is not None}


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose weights."""
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_FILE", help=CHECKPOINT)
    add_weights_arguments(parser)


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that control how a checkpoint is read."""
    add_no_ema_argument(parser)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config file or name of a shipped config (default: taken from the checkpoint)",
    )


def add_no_ema_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that selects the last weights over their moving average."""
    parser.add_argument(
        "--no-ema",
        dest="ema",
        action="store_false",
        help="use the last weights instead of their moving average",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that uses a model."""
    add_checkpoint_arguments(parser)
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for device, precision and acceleration."""
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
        help="use torch.compile, which takes minutes at first: for many images of one size",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that write images."""
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="output folder, created if needed"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def add_image_arguments(
    parser: argparse.ArgumentParser,
    resize: str = "as they are",
    crop: str = "the whole image",
) -> None:
    """Add the arguments that choose images; `resize` and `crop` are the texts of their defaults."""
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
        help=f"resize the short side to N first (default: {resize})",
    )
    parser.add_argument(
        "--crop",
        type=positive,
        metavar="N",
        help=f"then take the centre crop of N x N (default: {crop})",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="of folders, use only files that match these patterns (default: all)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="of folders, leave out files that match these patterns",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="skip images with more than N pixels, before decoding (default: 178956970)",
    )
    add_format_arguments(parser)


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for what the numbers in image files mean."""
    parser.add_argument(
        "--range",
        dest="value_range",
        nargs=2,
        type=float,
        metavar=("BLACK", "WHITE"),
        help="stored values of black and white (default: those that the checkpoint was trained "
        "with, else the depth of the files)",
    )
    parser.add_argument(
        "--pages",
        choices=("first", "channels", "images"),
        help="what the pages of a TIFF file are (default: a file with several is an error)",
    )


def add_work_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the arguments of commands over many images; `verb` is what a process does to an image."""
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help=f"batch size per process: images that it {verb} at once (default: 8)",
    )
    parser.add_argument(
        "--num-workers",
        type=not_negative,
        default=4,
        metavar="N",
        help=f"worker processes that read images, per process that {verb} them (default: 4)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue an interrupted command")
    add_overwrite_argument(group, "a result of other arguments, or unfinished work")


def add_overwrite_argument(parser: argparse._ActionsContainer, what: str) -> None:
    """Add the argument that allows a command to replace `what`."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_mode_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that selects the posterior's mode or a sample."""
    parser.add_argument(
        "--mode",
        choices=("mode", "sample"),
        default="mode",
        help="decode the mode of the posterior (default) or a sample",
    )


def add_ssim_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that selects the variant of SSIM."""
    parser.add_argument(
        "--ssim",
        choices=("wang", "skimage"),
        default="wang",
        help="wang (default): Gaussian window, sigma 1.5, population variances; skimage: the "
        "defaults of scikit-image, uniform window 7 x 7, sample variances",
    )


def add_lpips_files(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for local weight files of LPIPS."""
    for name, what in (("features", "network's weights"), ("heads", "linear heads")):
        parser.add_argument(
            f"--lpips-{name}",
            metavar="FILE",
            help=f"the {what}, instead of the published ones, which are downloaded once",
        )


def add_tiling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for images that are large for the memory."""
    parser.add_argument(
        "--tiling",
        choices=("auto", "whole", "exact", "blend"),
        default="auto",
        help="whole; exact: in strips, with the same result; blend: in overlapping tiles, with the "
        "least memory and slightly different colours; auto (default): the first that fits",
    )
    parser.add_argument(
        "--tile",
        type=positive,
        default=512,
        metavar="N",
        help="blend: side of a tile in pixels (default: 512)",
    )
    parser.add_argument(
        "--overlap",
        type=not_negative,
        default=128,
        metavar="N",
        help="blend: minimum overlap of neighbouring tiles in pixels (default: 128)",
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
