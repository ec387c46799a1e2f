"""What `evaluate` is identified by, and what it writes and prints in the end."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_vae import __version__
from kl_vae.data import JoinedSource
from kl_vae.inference.evaluation.config import EvaluateConfig
from kl_vae.inference.evaluation.files import TABLE, skipped_images, write_files
from kl_vae.inference.evaluation.images import read_features
from kl_vae.inference.evaluation.results import evaluate_records
from kl_vae.inference.evaluation.table import as_text, rows_of
from kl_vae.inference.load import model_fingerprint
from kl_vae.inference.progress import Ledger
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.files import display_name


def identity(
    args: argparse.Namespace,
    models: list[AutoEncoderKL],
    source: JoinedSource,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """All that the figures depend on, but for rounding: devices and batch sizes may change."""
    networks = {}
    if "lpips" in config.metrics:
        networks["lpips"] = [args.lpips_net, args.lpips_features, args.lpips_heads]
    if "rfid" in config.metrics:
        networks["rfid"] = [args.fid_weights]
    return {
        "command": "evaluate",
        "checkpoints": [
            [checkpoint, model_fingerprint(model)]
            for checkpoint, model in zip(args.checkpoint, models, strict=True)
        ],
        "images": source.fingerprint,
        "max_pixels": args.max_pixels,
        **asdict(config),
        **networks,
    }


def finish(
    args: argparse.Namespace,
    out: Path,
    names: list[str],
    models: list[AutoEncoderKL],
    source: JoinedSource,
    config: EvaluateConfig,
    number: int,
    ledger: Ledger,
) -> int:
    """Sum up what `number` units recorded, write and print it; return the exit code."""
    skipped = skipped_images(ledger.read(number), source)
    images = len(source) - len(skipped)
    if not images:
        ledger.close()
        raise ValueError(
            f"none of the {len(skipped)} images can be used ({skipped[0]['path']}: "
            f"{skipped[0]['reason']}); give others to --images"
        )

    def features(position: int) -> Iterator[Tensor]:
        return read_features((ledger.path(unit, ".npy") for unit in range(number)), position)

    evaluations = evaluate_records(
        lambda: ledger.read(number), features if "rfid" in config.metrics else None, names
    )
    rows = rows_of(evaluations, args.lpips_net)
    about = _about(args, config, images, skipped)
    about_models = [
        {
            "checkpoint": display_name(checkpoint),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "downsampling_factor": model.downsampling_factor,
        }
        for checkpoint, model in zip(args.checkpoint, models, strict=True)
    ]
    write_files(out, evaluations, rows, lambda: ledger.read(number), source, about, about_models)
    print(as_text(names, rows))
    print(
        f"evaluated {_counted(len(names), 'checkpoint')} on {_counted(images, 'image')}: "
        f"{display_name(out / TABLE)}",
        flush=True,
    )
    ledger.close()
    return 1 if skipped else 0


def _about(
    args: argparse.Namespace, config: EvaluateConfig, images: int, skipped: list[dict[str, str]]
) -> dict[str, Any]:
    """What results.json begins with."""
    roots = [display_name(root) for root in args.images]
    shape = "whole" if config.crop is None else f"crops of {config.crop} x {config.crop}"
    if config.resize is not None:
        shape += f" after the short side was resized to {config.resize}"
    return {
        "heading": f"{_counted(images, 'image')} of {', '.join(roots)}, {shape}; {len(skipped)} "
        f"skipped; {config.precision}; the {config.mode} of the posterior decoded.",
        "images": roots,
        "number": images,
        "skipped": skipped,
        **asdict(config),
        "lpips_net": args.lpips_net if "lpips" in config.metrics else None,
        "versions": {"kl_vae": __version__, "torch": torch.__version__},
    }


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
