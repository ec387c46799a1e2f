"""Measure on this machine what a choice costs; prints Markdown."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kl_vae.cli.arguments import positive

if TYPE_CHECKING:
    import torch

    from kl_vae.ddconfig import DDConfig

HELP = "measure steps, optimisers and training recipes on this machine"


class Benchmark(NamedTuple):
    """A benchmark: what --help says of it, its arguments, and what runs it."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments: a command for each benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        inner = benchmarks.add_parser(name, help=benchmark.help, description=benchmark.help)
        benchmark.add_arguments(inner)


def run(args: argparse.Namespace) -> int:
    """Run a benchmark and print what it measured; 0.

    Raises:
        ValueError: what the user can mend; nothing has been measured then.
    """
    return BENCHMARKS[args.benchmark].run(args)


def _add_model_arguments(parser: argparse.ArgumentParser, size: int) -> None:
    """Add the arguments of a benchmark of one architecture."""
    parser.add_argument(
        "--config",
        default="kl-f8",
        metavar="FILE",
        help="config file or shipped config's name, of which only model.params.ddconfig and "
        "embed_dim are used (default: kl-f8)",
    )
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


def _add_step_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser, size=128)
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images a step (default: 1)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the step")
    parser.add_argument(
        "--perceptual-features",
        metavar="FILE",
        help="torchvision's VGG16 weights (default: random ones, which cost the same)",
    )


def _run_step(args: argparse.Namespace) -> int:
    from kl_vae.benchmark.step import compare_steps

    ddconfig, embed_dim, device = _prepare(args)
    result = compare_steps(
        ddconfig,
        embed_dim,
        device,
        size=args.size,
        batch_size=args.batch_size,
        repeats=args.repeats,
        precision=args.precision,
        perceptual_features=args.perceptual_features,
    )
    figures = {**dataclasses.asdict(result), "ratio": result.ratio}
    heading = (
        f"One GAN step of {args.config}: {args.batch_size} x {args.size} x {args.size} images, "
        f"{args.precision}, {args.repeats} of each by turns"
    )
    _report(args, heading, result.markdown(), device, figures)
    return 0


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser, size=256)
    parser.add_argument(
        "--images",
        type=positive,
        default=12,
        metavar="N",
        help="images a step and device, for what is computed (default: 12, as published)",
    )


def _run_optimizer(args: argparse.Namespace) -> int:
    from kl_vae.benchmark.optimizer import compare_optimizers

    ddconfig, embed_dim, device = _prepare(args)
    result = compare_optimizers(
        ddconfig, embed_dim, device, size=args.size, images=args.images, repeats=args.repeats
    )
    figures = {**dataclasses.asdict(result), "step_seconds": result.step_seconds()}
    heading = f"Adam and Muon on all parameters of {args.config}, {args.repeats} of each by turns"
    _report(args, heading, result.markdown(), device, figures)
    return 0


def _add_safety_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser, size=128)
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="images a step and rank (default: 1)",
    )


def _run_safety(args: argparse.Namespace) -> int:
    from kl_vae.benchmark.safety import measure_safety
    from kl_vae.training.distributed import connect

    ddconfig, embed_dim, _ = _prepare(args)
    with connect(args.device) as ranks:
        sizes = {"size": args.size, "batch_size": args.batch_size, "repeats": args.repeats}
        result = measure_safety(ddconfig, embed_dim, ranks, **sizes)
    if ranks.is_first:
        figures = {**dataclasses.asdict(result), "total": result.total}
        heading = (
            f"What the guards of a run cost, {args.config}: {args.batch_size} x {args.size} x "
            f"{args.size} images a rank, {args.repeats} of each by turns"
        )
        _report(args, heading, result.markdown(), ranks.device, figures)
    return 0


def _add_recipes_arguments(parser: argparse.ArgumentParser) -> None:
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


def _run_recipes(args: argparse.Namespace) -> int:
    from kl_vae.benchmark.comparison import compare, pictures, sooner, table
    from kl_vae.benchmark.machine import describe_machine
    from kl_vae.benchmark.recipes import Entry, Setting
    from kl_vae.device import choose_device
    from kl_vae.inference.grid import save_png

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


BENCHMARKS = {
    "step": Benchmark(
        "one GAN step of ours against the published sequence of operations",
        _add_step_arguments,
        _run_step,
    ),
    "optimizer": Benchmark(
        "what an update by Muon adds to a step, against Adam",
        _add_optimizer_arguments,
        _run_optimizer,
    ),
    "safety": Benchmark(
        "what it costs a healthy run to be ready for faults",
        _add_safety_arguments,
        _run_safety,
    ),
    "recipes": Benchmark(
        "training recipes side by side: quality against steps and time",
        _add_recipes_arguments,
        _run_recipes,
    ),
}


def _prepare(args: argparse.Namespace) -> tuple[DDConfig, int | None, torch.device]:
    """The architecture, embed_dim and the device, before anything is measured.

    Raises:
        ValueError: a config that cannot be used, a size that f does not divide, no such device or
            folder.
    """
    from kl_vae.config import load_model_params
    from kl_vae.device import choose_device
    from kl_vae.inference.sample import check_size
    from kl_vae.schema import from_mapping
    from kl_vae.training.config import ModelParams

    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise ValueError(f"--out {args.out}: give a file in a folder that exists")
    params = from_mapping(ModelParams, load_model_params(args.config), "model.params")
    if params.ddconfig.context_channels:
        raise ValueError(
            f"{args.config}: its model needs a context (context_channels="
            f"{params.ddconfig.context_channels}), which no command gives; take another config"
        )
    check_size(args.size, params.ddconfig.downsampling_factor)
    return params.ddconfig, params.embed_dim, choose_device(args.device)


def _report(
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
