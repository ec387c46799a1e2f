"""What the benchmarks share: arguments, checks before anything is measured, and the report."""

from __future__ import annotations

import argparse
import json
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
        help="how often each is timed, by turns (default: 5)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cuda:N, mps or cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here too")


def prepare(args: argparse.Namespace) -> tuple[DDConfig, int | None, torch.device]:
    """Return the architecture, embed_dim and the device, before anything is measured.

    Raises:
        ValueError: a config that cannot be used, a size that f does not divide, no such device or
            folder.
    """
    from kl_vae.config import load_model_params
    from kl_vae.device import choose_device
    from kl_vae.inference.sampling.prior import check_size
    from kl_vae.schema import from_mapping
    from kl_vae.training.config import ModelParams

    check_out(args.out)
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
    """Print heading, table and machine; with --out also write arguments and figures as JSON."""
    from kl_vae.benchmark.machine import describe_machine
    from kl_vae.files import write_text_atomically

    machine = describe_machine(device)
    print(f"{heading}.\n\n{table}\n\nMeasured on {machine}.")
    if args.out is not None:
        keys = ("benchmark", "config", "size", "batch_size", "images", "precision", "repeats")
        about = {key: getattr(args, key) for key in keys if hasattr(args, key)}
        content = {**about, "device": str(device), "machine": machine, **figures}
        write_text_atomically(args.out, json.dumps(content, indent=2) + "\n")
