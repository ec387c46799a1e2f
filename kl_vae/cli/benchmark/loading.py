"""`kl-vae benchmark loading`."""

from __future__ import annotations

import argparse
import dataclasses

from kl_vae.cli.benchmark.shared import add_model_arguments, prepare, report

HELP = "what it takes to read a checkpoint, against safetensors and load_state_dict alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from kl_vae.benchmark.loading import compare_loading

    ddconfig, embed_dim, device = prepare(args)
    result = compare_loading(ddconfig, embed_dim, device, repeats=args.repeats)
    figures = {**dataclasses.asdict(result), "ratios": result.ratios}
    heading = f"Reading {args.config} of {result.megabytes:.0f} MB, {args.repeats} of each by turns"
    report(args, heading, result.markdown(), device, figures)
    return 0
