"""Write the weights of a checkpoint alone."""

import argparse

HELP = "write a checkpoint's weights and architecture alone, without optimisers and losses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN_OR_FILE",
        help="a run directory or a checkpoint file",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write, .pt")
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="the weights as trained last, where the checkpoint has their moving average as well",
    )


def run(args: argparse.Namespace) -> int:
    """Write the file; 0.

    Raises:
        ValueError: no checkpoint there, or a file that exists or cannot be written.
    """
    from pathlib import Path

    from kl_vae.formats.checkpoint import export_checkpoint

    out = Path(args.out)
    which = export_checkpoint(Path(args.checkpoint), out, ema=not args.no_ema)
    print(f"{which} in {out}")
    return 0
