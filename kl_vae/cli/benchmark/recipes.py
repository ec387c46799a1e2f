"""`kl-vae benchmark recipes`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kl_vae.cli.arguments import positive

HELP = "training recipes side by side: quality against steps and time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="of the config, as for train"
    )
    parser.add_argument(
        "--recipe",
        action="append",
        required=True,
        metavar="NAME:STEPS[:RATE]",
        help="published, ours, mse or gan, optimisation steps, and a learning rate in place of "
        "the recipe's; once for each entry",
    )
    parser.add_argument(
        "--config",
        default="quickstart",
        metavar="FILE",
        help="whose data and architecture are trained (default: quickstart)",
    )
    parser.add_argument(
        "--perceptual-features",
        required=True,
        type=Path,
        metavar="FILE",
        help="torchvision's SqueezeNet 1.1 weights, for the loss and the measure",
    )
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="runs of each entry (default: 1)"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cuda:N, mps or cpu")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="where the runs are kept"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from kl_vae.benchmark.comparison import compare, pictures, sooner, table
    from kl_vae.benchmark.machine import describe_machine
    from kl_vae.benchmark.recipes import Entry, Setting
    from kl_vae.runtime.device import choose_device
    from kl_vae.visual.grid import save_png

    entries = [Entry.parse(text) for text in args.recipe]
    setting = Setting(
        args.config, tuple(args.overrides), args.perceptual_features, args.out, args.device
    )
    points = compare(setting, entries, args.seeds)
    print(table(points))
    for entry in entries[1:]:
        print(f"\n{sooner(points, entries[0], entry)}.")
    save_png(args.out / "comparison.png", pictures(setting, entries, 8))
    print(f"\nMeasured on {describe_machine(choose_device(args.device))}; seeds: {args.seeds}.")
    rows = ", ".join(entry.name for entry in entries)
    print(f"{args.out / 'comparison.png'}: a row of inputs, then of {rows}.")
    return 0
