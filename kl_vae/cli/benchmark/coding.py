"""`kl-vae benchmark encode` and `kl-vae benchmark decode`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kl_vae.cli.arguments import positive
from kl_vae.cli.benchmark.shared import (
    add_compute_arguments,
    add_model_arguments,
    check_out,
    prepare,
    report,
    using_threads,
)

HELP = "time and rate of encoding, or of decoding, ours and diffusers'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=positive,
        default=[256],
        metavar="N",
        help="sides of the images in pixels (default: 256)",
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=positive,
        default=[1],
        metavar="N",
        help="images at once (default: 1)",
    )
    add_compute_arguments(parser)
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw how the cost grows; needs matplotlib",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from tqdm import tqdm

    from kl_vae.benchmark.inference import measure_coding
    from kl_vae.benchmark.machine import describe_machine
    from kl_vae.benchmark.measurement import table
    from kl_vae.benchmark.plots import matplotlib_figure, plot_growth
    from kl_vae.benchmark.twin import why_no_twin
    from kl_vae.inference.encode import check_size

    ddconfig, embed_dim, device = prepare(args)
    for size in args.sizes:
        check_size(size, ddconfig.downsampling_factor)
    check_out(args.plot, "--plot")
    if args.plot is not None:
        matplotlib_figure()  # an error before anything is measured
    with using_threads(args.threads):
        steps = measure_coding(
            ddconfig,
            embed_dim,
            device,
            args.benchmark,
            sizes=args.sizes,
            batch_sizes=args.batch_sizes,
            repeats=args.repeats,
            precision=args.precision,
            compiled=args.compile,
        )
        total = len(args.sizes) * len(args.batch_sizes)
        measured = [m for each in tqdm(steps, total=total, disable=None) for m in each]
        if args.plot is not None:
            title = f"{args.benchmark}, {args.config}, {args.precision}, {describe_machine(device)}"
            plot_growth(measured, args.plot, title)
        result = "moments" if args.benchmark == "encode" else "images"
        parts = [why_no_twin(ddconfig, embed_dim), table(measured, result)]
        text = "\n\n".join(part for part in parts if part)
        heading = (
            f"To {args.benchmark} by {args.config}, {args.precision}, {args.repeats} of each by "
            "turns"
        )
        figures = {"measured": [m.figures for m in measured], "without_diffusers": parts[0]}
        report(args, heading, text, device, figures)
    return 0
