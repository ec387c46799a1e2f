"""`kl-vae benchmark latents`."""

from __future__ import annotations

import argparse
import dataclasses

from kl_vae.cli.arguments import not_negative, positive
from kl_vae.cli.benchmark.shared import add_model_arguments, prepare, report

HELP = "an epoch over latents that are kept, against encoding the images once more"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser, size=32)
    parser.set_defaults(config="cifar10")
    parser.add_argument(
        "--number", type=positive, default=10_000, metavar="N", help="images (default: 10,000)"
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--num-workers",
        type=not_negative,
        default=1,
        metavar="N",
        help="processes that decode images, and read latents (default: 1)",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp16", help="default: fp16"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from kl_vae.benchmark.latents import compare_latents
    from kl_vae.inference.encode import EncodeConfig

    ddconfig, embed_dim, device = prepare(args)
    config = EncodeConfig(
        dtype=args.dtype, batch_size=args.batch_size, num_workers=args.num_workers
    )
    result = compare_latents(
        ddconfig, embed_dim, device, args.size, config, args.number, args.repeats
    )
    heading = (
        f"{args.number:,} images of {args.size} x {args.size} by {args.config}, and their moments "
        f"in {args.dtype} ({result.megabytes:.1f} MB), {args.repeats} epochs"
    )
    figures = {**dataclasses.asdict(result), "number": args.number, "ratio": result.ratio}
    report(args, heading, result.markdown(), device, figures)
    return 0
