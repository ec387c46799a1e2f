"""Write the weights of a checkpoint alone."""

import argparse

from kl_vae.cli.arguments import add_checkpoint_arguments, add_overwrite_argument, keywords

HELP = "write weights and architecture of a checkpoint, without optimizers and losses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="output file, .pt")
    add_overwrite_argument(parser, "an existing file")


def run(args: argparse.Namespace) -> int:
    """Call `kl_vae.export` and print what was written; return 0."""
    from kl_vae.inference.convert import export

    result = export(**keywords(export, args))
    print(f"{result.weights} in {result.path}")
    return 0
