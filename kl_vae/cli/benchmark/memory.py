"""`kl-vae benchmark memory`."""

from __future__ import annotations

import argparse

from kl_vae.cli.arguments import positive
from kl_vae.cli.benchmark.shared import (
    add_model_arguments,
    add_threads_argument,
    prepare,
    report,
    using_threads,
)

HELP = "the most memory that decoding, encoding and a training step take, ours and diffusers'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser, size=1024)
    parser.set_defaults(repeats=1)
    parser.add_argument(
        "--step-size",
        type=positive,
        default=256,
        metavar="N",
        help="side of the images of a training step in pixels (default: 256)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images (default: 1)"
    )
    parser.add_argument(
        "--what",
        nargs="+",
        choices=("decode", "encode", "step"),
        default=("decode", "encode", "step"),
        help="default: all",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32"
    )
    add_threads_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from kl_vae.benchmark.memory import figures, measure_memory, table
    from kl_vae.benchmark.twin import why_no_twin
    from kl_vae.inference.encode import check_size

    ddconfig, embed_dim, device = prepare(args)
    check_size(args.step_size, ddconfig.downsampling_factor)
    with using_threads(args.threads):
        measured = [
            m
            for work in args.what
            for m in measure_memory(
                ddconfig,
                embed_dim,
                device,
                work,
                size=args.step_size if work == "step" else args.size,
                batch_size=args.batch_size,
                repeats=args.repeats,
                precision=args.precision,
            )
        ]
        without = why_no_twin(ddconfig, embed_dim)
        text = "\n\n".join(part for part in (without, table(measured)) if part)
        heading = f"Memory, {args.config}, {args.precision}, {args.repeats} of each by turns"
        content = {"measured": figures(measured), "without_diffusers": without}
        report(args, heading, text, device, content)
    return 0
