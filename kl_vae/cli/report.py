"""Make a page on runs: their curves, images, status and config, while they run or afterwards."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kl_vae.cli.arguments import positive

HELP = "make a page of curves and images on a run or several, or print their state"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="the run's directory; the page of several compares them",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in the run; of several, in the current directory)",
    )
    parser.add_argument(
        "--embed",
        action="store_true",
        help="embed the images in the page, so that it is a single file",
    )
    parser.add_argument(
        "--text", action="store_true", help="print the state of each run, and write no page"
    )
    parser.add_argument(
        "--watch",
        type=positive,
        metavar="SECONDS",
        help="write the page (or print) again at this interval, until all runs end or Ctrl-C",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, or print; 0. Of several ranks only rank 0 does it.

    Raises:
        ValueError: there is no run, or the page cannot be written.
    """
    from kl_vae.runtime.files import display_name
    from kl_vae.visual.report import RunReport, report

    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    separator = ""

    def print_text(result: RunReport) -> None:
        nonlocal separator
        _print(separator + result.text)
        separator = "\n"

    result = report(
        args.runs,
        args.out,
        write=not args.text,
        embed=args.embed,
        watch_seconds=args.watch,
        on_report=print_text if args.text else lambda result: None,
    )
    if result.page is not None:
        reading = result.reading
        state = f"{reading.progress}, {reading.state}"
        if len(result.runs) > 1:
            state = f"{len(result.runs)} runs, {result.number_running} running"
        print(f"report: {display_name(result.page)} ({state})")
    return 0


def _print(text: str) -> None:
    """Print; exit if the output pipe is closed, for example by `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        raise SystemExit(0) from None
