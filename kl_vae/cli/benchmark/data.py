"""`kl-vae benchmark data`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kl_vae.cli.arguments import not_negative, positive

HELP = "images a second that are read, cropped and stacked, against torchvision's ImageFolder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument(
        "--folder",
        type=Path,
        help="of JPEGs and other pictures (default: smooth random JPEGs are made, and removed)",
    )
    parser.add_argument(
        "--images",
        type=positive,
        default=512,
        metavar="N",
        help="about how many a pass reads, and at most how many are made (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=positive,
        default=512,
        metavar="N",
        help="side of those that are made, in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--crop", type=positive, default=256, metavar="N", help="side, in pixels (default: 256)"
    )
    parser.add_argument(
        "--resize",
        nargs="+",
        type=not_negative,
        metavar="N",
        help="short sides before the crop, in pixels; 0: as they are (default: that of --crop, 0)",
    )
    parser.add_argument(
        "--workers",
        nargs="+",
        type=not_negative,
        metavar="N",
        help="numbers of processes that decode; 0: this one (default: 0 1 2, as there are cores)",
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--repeats",
        type=positive,
        default=5,
        metavar="N",
        help="how often each pass is timed, by turns (default: 5)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here too")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0.

    Raises:
        ValueError: a folder that is none, images that are too few or too small, more workers than
            cores.
    """
    import torch

    from kl_vae.benchmark.data import Loading, compare_feeds, folder_of, table
    from kl_vae.cli.benchmark.shared import check_out, report
    from kl_vae.data.loader import workers_that_fit

    check_out(args.out)
    if args.folder is not None and not args.folder.is_dir():
        raise ValueError(f"--folder {args.folder}: give a folder of pictures")
    workers = args.workers or range(workers_that_fit(2) + 1)
    for number in workers:
        if workers_that_fit(number) < number:
            raise ValueError(f"--workers {number}: give no more than there are cores")
    loading = Loading(args.crop, args.batch_size, args.images)
    resizes = [size or None for size in args.resize or (args.crop, 0)]
    with folder_of(args.folder, args.images, args.size) as folder:
        feeds = compare_feeds(folder, loading, resizes, workers, args.repeats)
    heading = (
        f"Crops of {args.crop} x {args.crop} in batches of {args.batch_size}, one thread a "
        f"process, {args.repeats} passes of each by turns"
    )
    figures = {
        "feeds": [
            {
                **{"resize": feed.resize, "workers": feed.workers, "images_per_second": feed.rates},
                "ratios": {name: feed.ratio(name) for name in feed.rates},
                "draft_psnr": feed.draft_psnr,
            }
            for feed in feeds
        ],
        "crop": args.crop,
    }
    report(args, heading, table(feeds), torch.device("cpu"), figures)
    return 0
