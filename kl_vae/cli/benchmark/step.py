"""`kl-vae benchmark step`."""

from __future__ import annotations

import argparse
import dataclasses

from kl_vae.cli.arguments import positive
from kl_vae.cli.benchmark.shared import add_model_arguments, prepare, report

HELP = "one GAN step of ours against the published sequence of operations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser, size=128)
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images a step (default: 1)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the step")
    parser.add_argument(
        "--perceptual-features",
        metavar="FILE",
        help="torchvision's VGG16 weights (default: random ones, which cost the same)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from kl_vae.benchmark.step import compare_steps

    ddconfig, embed_dim, device = prepare(args)
    result = compare_steps(
        ddconfig,
        embed_dim,
        device,
        size=args.size,
        batch_size=args.batch_size,
        repeats=args.repeats,
        precision=args.precision,
        perceptual_features=args.perceptual_features,
    )
    figures = {**dataclasses.asdict(result), "ratio": result.ratio}
    heading = (
        f"One GAN step of {args.config}: {args.batch_size} x {args.size} x {args.size} images, "
        f"{args.precision}, {args.repeats} of each by turns"
    )
    report(args, heading, result.markdown(), device, figures)
    return 0
