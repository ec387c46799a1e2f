"""`kl-vae benchmark safety`."""

from __future__ import annotations

import argparse
import dataclasses

from kl_vae.cli.arguments import positive
from kl_vae.cli.benchmark.shared import add_model_arguments, prepare, report

HELP = "what it costs a healthy run to be ready for faults"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser, size=128)
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="images a step and rank (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from kl_vae.benchmark.safety import measure_safety
    from kl_vae.runtime.distributed import connect

    ddconfig, embed_dim, _ = prepare(args)
    with connect(args.device) as ranks:
        sizes = {"size": args.size, "batch_size": args.batch_size, "repeats": args.repeats}
        result = measure_safety(ddconfig, embed_dim, ranks, **sizes)
    if ranks.is_first:
        figures = {**dataclasses.asdict(result), "total": result.total}
        heading = (
            f"What the guards of a run cost, {args.config}: {args.batch_size} x {args.size} x "
            f"{args.size} images a rank, {args.repeats} of each by turns"
        )
        report(args, heading, result.markdown(), ranks.device, figures)
    return 0
