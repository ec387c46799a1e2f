"""`kl-vae benchmark optimizer`."""

from __future__ import annotations

import argparse
import dataclasses

from kl_vae.cli.arguments import positive
from kl_vae.cli.benchmark.shared import add_model_arguments, prepare, report

HELP = "what an update by Muon adds to a step, against Adam"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser, size=256)
    parser.add_argument(
        "--images",
        type=positive,
        default=12,
        metavar="N",
        help="images a step and device, for what is computed (default: 12, as published)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from kl_vae.benchmark.optimizer import compare_optimizers

    ddconfig, embed_dim, device = prepare(args)
    result = compare_optimizers(
        ddconfig, embed_dim, device, size=args.size, images=args.images, repeats=args.repeats
    )
    figures = {**dataclasses.asdict(result), "step_seconds": result.step_seconds()}
    heading = f"Adam and Muon on all parameters of {args.config}, {args.repeats} of each by turns"
    report(args, heading, result.markdown(), device, figures)
    return 0
