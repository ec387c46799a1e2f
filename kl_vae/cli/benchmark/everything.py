"""`kl-vae benchmark all`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from kl_vae.cli.arguments import positive
from kl_vae.cli.benchmark.shared import (
    add_compute_arguments,
    add_model_arguments,
    prepare,
)

HELP = "encode, decode, step, memory and data, one after the other, in one report"

NAMES = ("encode", "decode", "step", "memory", "data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser)
    parser.set_defaults(repeats=None)
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, help="these alone (default: all)"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=positive,
        default=[256, 512],
        metavar="N",
        help="of encode and decode, in pixels (default: 256 512)",
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive, metavar="N", help="of encode and decode"
    )
    for name, about in (("step", "of the step"), ("memory", "of the memory of decode and encode")):
        parser.add_argument(
            f"--{name}-size", type=positive, metavar="N", help=f"{about}, in pixels"
        )
    parser.add_argument(
        "--step-batch-size", type=positive, metavar="N", help="of the step and its memory"
    )
    add_compute_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0.

    What is not given is as the benchmarks have it by themselves. The files are written anew after
    each benchmark, so that what was measured is there if a later one fails.

    Raises:
        ValueError: what the user can mend.
        RunError: a measurement failed.
    """
    from kl_vae.cli.benchmark import BENCHMARKS
    from kl_vae.inference.encode import check_size
    from kl_vae.runtime.files import write_text_atomically

    ddconfig, _, _ = prepare(args)
    for size in (*args.sizes, args.step_size, args.memory_size):
        if size is not None:
            check_size(size, ddconfig.downsampling_factor)
    content: dict[str, Any] = {"benchmark": "all"}
    pages = [f"# kl_vae, {args.config}"]
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in NAMES if name in args.only and name in BENCHMARKS):
            content[name], text = _measure(name, args, Path(folder))
            pages.append(text.rstrip())
            if args.out is not None:
                write_text_atomically(args.out, json.dumps(content, indent=2) + "\n")
            if args.markdown is not None:
                write_text_atomically(args.markdown, "\n\n".join(pages) + "\n")
            print()
    return 0


def _measure(name: str, args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
    """Run one benchmark with its own defaults and what is given of `args`; what it reports."""
    from kl_vae.cli.benchmark import BENCHMARKS

    parser = argparse.ArgumentParser()
    BENCHMARKS[name].add_arguments(parser)
    inner = parser.parse_args([])
    same = ("config", "device", "precision", "threads", "compile")
    given = {key: getattr(args, key) for key in same}
    if name != "memory":  # which differs little from one call to the next
        given["repeats"] = args.repeats
    if name in ("encode", "decode"):
        given |= {"sizes": args.sizes, "batch_sizes": args.batch_sizes}
    if name == "step":
        given |= {"size": args.step_size, "batch_size": args.step_batch_size}
    if name == "memory":
        given |= {"size": args.memory_size, "step_size": args.step_size}
        given |= {"batch_size": args.step_batch_size}
    for key, value in given.items():
        if value is not None and hasattr(inner, key):
            setattr(inner, key, value)
    inner.benchmark, inner.out, inner.markdown = name, folder / "out.json", folder / "out.md"
    BENCHMARKS[name].run(inner)
    return json.loads(inner.out.read_text()), inner.markdown.read_text()
