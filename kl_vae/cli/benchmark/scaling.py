"""`kl-vae benchmark scaling`."""

from __future__ import annotations

import argparse
import dataclasses

from kl_vae.cli.arguments import positive
from kl_vae.cli.benchmark.shared import (
    add_model_arguments,
    add_threads_argument,
    prepare,
    report,
    using_threads,
)

HELP = "a training step on one rank, and on several that share its threads, on the CPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser, size=128)
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=2,
        metavar="N",
        help="images a step over all ranks, a multiple of --ranks (default: 2)",
    )
    parser.add_argument("--ranks", type=positive, default=2, metavar="N", help="default: 2")
    add_threads_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from kl_vae.benchmark.scaling import Job, compare_scaling

    ddconfig, embed_dim, device = prepare(args)
    if device.type != "cpu":
        raise ValueError(f"--device {args.device}: this compares ranks on the CPU; give cpu")
    if args.ranks == 1:
        raise ValueError("--ranks 1: one rank is what the others are compared with; give 2 or more")
    with using_threads(args.threads) as threads:
        for flag, number in (("--threads", threads), ("--batch-size", args.batch_size)):
            if number % args.ranks:
                raise ValueError(
                    f"{flag} {number}: --ranks {args.ranks} cannot share it evenly; give a "
                    f"multiple of {args.ranks}"
                )
        job = Job(ddconfig, embed_dim, args.size, args.batch_size)
        result = compare_scaling(job, args.ranks, threads, args.repeats)
        heading = (
            f"A plain step of {args.config}: {args.batch_size} x {args.size} x {args.size} images "
            f"over all ranks, fp32, {args.repeats} of each by turns"
        )
        computed = {key: getattr(result, key) for key in ("speed", "exposed", "overlap")}
        report(args, heading, result.markdown(), device, {**dataclasses.asdict(result), **computed})
    return 0
