"""Measure on this machine what a choice costs; prints Markdown."""

import argparse

from kl_vae.cli.benchmark import (
    coding,
    data,
    everything,
    latents,
    loading,
    memory,
    optimizer,
    recipes,
    safety,
    scaling,
    step,
    tiling,
)

HELP = "measure steps, optimisers, training recipes and more on this machine"

BENCHMARKS = {
    "encode": coding,
    "decode": coding,
    "step": step,
    "memory": memory,
    "all": everything,
    "scaling": scaling,
    "optimizer": optimizer,
    "safety": safety,
    "loading": loading,
    "latents": latents,
    "recipes": recipes,
    "tiling": tiling,
    "data": data,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments: a command for each benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        inner = benchmarks.add_parser(name, help=benchmark.HELP, description=benchmark.HELP)
        benchmark.add_arguments(inner)


def run(args: argparse.Namespace) -> int:
    """Run a benchmark and print what it measured; 0.

    Raises:
        ValueError: what the user can mend; nothing has been measured then.
    """
    return int(BENCHMARKS[args.benchmark].run(args))
