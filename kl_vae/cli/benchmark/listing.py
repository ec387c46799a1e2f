"""`kl-vae benchmark listing`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from kl_vae.cli.arguments import positive

HELP = "what it takes to list a large folder of images, without and with the cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where empty files are made, once; they stay there",
    )
    parser.add_argument(
        "--files",
        type=positive,
        default=1_000_000,
        metavar="N",
        help="how many, in folders of 1,000 (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        default=3,
        metavar="N",
        help="how often each way is timed, by turns (default: 3)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here too")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0.

    Raises:
        ValueError: the folder holds something else, or there would be too few files.
    """
    import torch
    from tqdm import tqdm

    from kl_vae.benchmark.listing import check_folder, make_files, measure_listing
    from kl_vae.cli.benchmark.shared import check_out, report

    check_out(args.out)
    if not check_folder(args.folder, args.files):
        with tqdm(total=args.files, unit="file", disable=None) as progress:
            for made in make_files(args.folder, args.files):
                progress.update(made - progress.n)
    result = measure_listing(args.folder, args.repeats)
    figures = {
        name: [dataclasses.asdict(one) for one in each] for name, each in result.measured.items()
    }
    heading = f"Listing {args.files:,} files, {args.repeats} of each by turns"
    report(args, heading, result.markdown(), torch.device("cpu"), {"measured": figures})
    return 0
