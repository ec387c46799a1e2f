"""What the benchmarks share: arguments, checks before anything is measured, and the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kl_vae.cli.arguments import positive

if TYPE_CHECKING:
    import torch

    from kl_vae.ddconfig import DDConfig


def add_model_arguments(parser: argparse.ArgumentParser, size: int | None = None) -> None:
    """Add the arguments of a benchmark of one architecture, and of images unless size is None."""
    parser.add_argument(
        "--config",
        default="kl-f8",
        metavar="FILE",
        help="config file or shipped config's name, of which only model.params.ddconfig and "
        "embed_dim are used (default: kl-f8)",
    )
    if size is not None:
        parser.add_argument(
            "--size",
            type=positive,
            default=size,
            metavar="N",
            help=f"side of the images in pixels (default: {size})",
        )
    parser.add_argument(
        "--repeats",
        type=positive,
        default=5,
        metavar="N",
        help="how often each is timed, by turns (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cuda:N, mps or cpu")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where results are written."""
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here too")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE.md", help="write what is printed here too"
    )


def add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how a benchmark computes."""
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32"
    )
    parser.add_argument(
        "--compile", action="store_true", help="measure all also as torch.compile makes them"
    )
    add_threads_argument(parser)


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """Add the number of threads."""
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="of torch on the CPU (default: its choice)"
    )


@contextmanager
def using_threads(number: int | None) -> Iterator[int]:
    """Let torch use so many threads within, or as many as it does; give their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)


def prepare(args: argparse.Namespace) -> tuple[DDConfig, int | None, torch.device]:
    """Return the architecture, embed_dim and the device, before anything is measured.

    Raises:
        ValueError: a config that cannot be used, a size that f does not divide, no such device or
            folder.
    """
    from kl_vae.inference.encode import check_size
    from kl_vae.runtime.config_file import load_model_params
    from kl_vae.runtime.device import choose_device
    from kl_vae.runtime.schema import from_mapping
    from kl_vae.training.config import ModelParams

    check_out(args.out)
    check_out(getattr(args, "markdown", None), "--markdown")
    params = from_mapping(ModelParams, load_model_params(args.config), "model.params")
    if params.ddconfig.context_channels:
        raise ValueError(
            f"{args.config}: its model needs a context (context_channels="
            f"{params.ddconfig.context_channels}), which no command gives; take another config"
        )
    if hasattr(args, "size"):
        check_size(args.size, params.ddconfig.downsampling_factor)
    return params.ddconfig, params.embed_dim, choose_device(args.device)


def check_out(out: Path | None, flag: str = "--out") -> None:
    """Raise ValueError unless the flag's file can be written, or is not given."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"{flag} {out}: give a file in a folder that exists")


def report(
    args: argparse.Namespace,
    heading: str,
    table: str,
    device: torch.device,
    figures: dict[str, Any],
) -> None:
    """Print heading, table and machine; write them and the figures where `args` says.

    --out takes the arguments and the figures as JSON, --markdown a section of a page.
    """
    from kl_vae.benchmark.machine import describe_machine
    from kl_vae.runtime.files import write_text_atomically

    machine = describe_machine(device)
    print(f"{heading}.\n\n{table}\n\nMeasured on {machine}.")
    if args.out is not None:
        about = {key: getattr(args, key) for key in _ABOUT if hasattr(args, key)}
        content = {**about, "device": str(device), "machine": machine, **figures}
        write_text_atomically(args.out, json.dumps(content, indent=2) + "\n")
    if getattr(args, "markdown", None) is not None:
        text = f"## {heading}\n\n{table}\n\nMeasured on {machine}.\n"
        write_text_atomically(args.markdown, text)


_ABOUT = (
    "benchmark",
    "config",
    "size",
    "batch_size",
    "images",
    "precision",
    "compile",
    "repeats",
)
