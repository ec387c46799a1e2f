"""Make a page on a run: its curves, pictures, status and config, while it goes on or after it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kl_vae.cli.arguments import positive

if TYPE_CHECKING:
    from kl_vae.visual.report.metrics_file import MetricsFile

HELP = "make a page of curves and pictures on a run, or print how it stands"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: report.html in the run)"
    )
    parser.add_argument(
        "--embed", action="store_true", help="put the pictures into the page, to send one file"
    )
    parser.add_argument(
        "--text", action="store_true", help="print how the run stands, and write no page"
    )
    parser.add_argument(
        "--watch",
        type=positive,
        metavar="SECONDS",
        help="write the page (or print) again so often, until the run ends or Ctrl-C",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, or print; 0. Of several ranks the first does it alone.

    Raises:
        ValueError: there is no run, or the page cannot be written.
    """
    import time
    from contextlib import suppress

    from kl_vae.checkpoints.run_directory import METRICS
    from kl_vae.runtime.files import display_name
    from kl_vae.visual.report.directory import check_run_directory, read_run
    from kl_vae.visual.report.metrics_file import MetricsFile
    from kl_vae.visual.report.page import REPORT, check_output, write_page
    from kl_vae.visual.report.run_reading import RunReading
    from kl_vae.visual.report.terminal import describe_run

    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    check_run_directory(args.run)
    out = args.out or args.run / REPORT
    if not args.text:
        check_output(out)
    metrics = MetricsFile(args.run / METRICS)

    def report() -> RunReading:
        _read(metrics, args.run / METRICS)
        reading = read_run(args.run, metrics)
        if args.text:
            _print("\n".join(describe_run(reading, metrics)))
        else:
            write_page(out, reading, metrics, args.embed)
        return reading

    reading = report()
    with suppress(KeyboardInterrupt):  # the page is whole at any time
        while args.watch is not None and reading.state == "running":
            time.sleep(args.watch)
            if args.text:
                print()
            reading = report()
    if not args.text:
        print(f"report: {display_name(out)} ({reading.progress}, {reading.state})")
    return 0


def _print(text: str) -> None:
    """Print; where what read it (such as `head`) has enough, that ends the command."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        raise SystemExit(0) from None


def _read(metrics: MetricsFile, path: Path) -> None:
    """Read what is new, with a bar where it is long."""
    from tqdm import tqdm

    size = path.stat().st_size if path.is_file() else 0
    with tqdm(total=size, unit="B", unit_scale=True, delay=1.0, leave=False, disable=None) as bar:
        metrics.read(bar.update)
