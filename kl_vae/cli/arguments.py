"""The arguments that several commands share."""

import argparse


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose weights."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN_OR_FILE",
        help="a run directory or a checkpoint file",
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="the weights as trained last, where a checkpoint has their moving average as well",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that uses a model."""
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config file or shipped config's name, for a checkpoint that does not hold its own",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the pictures go; is created"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cuda:N, mps or cpu")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32"
    )


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give an integer of at least 1")
    return number
