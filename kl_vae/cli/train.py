"""Train an autoencoder on a folder of images, or resume the run in the run directory."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "train on a folder of images, or resume"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kl-vae train`."""
    parser.add_argument(
        "config",
        help="a YAML file, the name of a shipped config such as kl-f8, or the directory of a run "
        "to resume",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="overrides of config values, such as data.train.root=FOLDER",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="the run's directory (default: runs/CONFIG, or that of the run to resume)",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps, cpu or cuda:INDEX")


def run(args: argparse.Namespace) -> int:
    """Train; return 0, also if a signal stopped the run after saving it."""
    from kl_vae.training.loop import train

    train(args.config, args.run_dir, overrides=args.overrides, device=args.device)
    return 0
