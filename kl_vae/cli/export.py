"""Write the weights of a checkpoint alone."""

import argparse

from kl_vae.cli.arguments import add_checkpoint_arguments

HELP = "write a checkpoint's weights and architecture alone, without optimisers and losses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write, .pt")


def run(args: argparse.Namespace) -> int:
    """Write the file; 0.

    Raises:
        ValueError: no checkpoint there, or a file that exists or cannot be written.
    """
    from pathlib import Path

    from kl_vae.checkpoints.pretrained import export_checkpoint
    from kl_vae.runtime.config_file import load_model_params

    out = Path(args.out)
    given = None if args.config is None else load_model_params(args.config)
    which = export_checkpoint(args.checkpoint, out, ema=not args.no_ema, given=given)
    print(f"{which} in {out}")
    return 0
