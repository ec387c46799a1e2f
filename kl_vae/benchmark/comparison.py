"""Recipes side by side: quality against steps and against time, over several seeds."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_vae.benchmark.recipes import Entry, Setting
from kl_vae.data import ImageDataset, build_datasets, normalized
from kl_vae.losses.lpips import LPIPS
from kl_vae.metrics.similarity import psnr, ssim
from kl_vae.model import AutoEncoderKL
from kl_vae.training.config import RunConfig
from kl_vae.training.loop import train
from kl_vae.visual.grid import image_grid
from kl_vae.visual.image_files import as_picture, as_saved

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """Mean figures over the validation set after so many steps and seconds of training."""

    step: int
    seconds: float
    psnr: float  # dB
    ssim: float
    perceptual: float  # nan: not measured on the way


def compare(
    setting: Setting, entries: Sequence[Entry], seeds: int
) -> dict[Entry, list[list[Point]]]:
    """Train every entry with every seed, the entries in turn; of each run its points.

    Raises:
        ValueError: as `train`.
    """
    perceptual = LPIPS("squeeze", linear=False, features=setting.features)
    _validation_set(setting.run_config(entries[0], 0))  # or an error before anything is trained
    points: dict[Entry, list[list[Point]]] = {entry: [] for entry in entries}
    for seed in range(seeds):
        for entry in entries:
            config, run = setting.run_config(entry, seed), setting.run_folder(entry, seed)
            logger.info("%s, seed %d: %d steps", entry.name, seed, entry.steps)
            train(config, run, setting.device)
            points[entry].append([*_read_points(run)])
            # the last point is measured alike for all, on the posterior's mode
            model = AutoEncoderKL.from_checkpoint(run)
            last = points[entry][-1][-1]
            figures = _measure(model, _validation_set(config), perceptual)
            points[entry][-1][-1] = Point(last.step, last.seconds, *figures)
    return points


def table(points: dict[Entry, list[list[Point]]]) -> str:
    """A Markdown table: mean and standard deviation over the seeds at each validation."""
    lines = [
        "| recipe | step | seconds | PSNR, dB | SSIM | perceptual |",
        "|---|---|---|---|---|---|",
    ]
    for entry, runs in points.items():
        for at in zip(*runs, strict=True):
            cells = [entry.name, str(at[0].step), f"{statistics.mean(p.seconds for p in at):.0f}"]
            for key, digits in (("psnr", 2), ("ssim", 3), ("perceptual", 3)):
                cells.append(_mean_and_deviation([getattr(p, key) for p in at], digits))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sooner(points: dict[Entry, list[list[Point]]], slow: Entry, fast: Entry) -> str:
    """When the mean PSNR of `fast` reached the last one of `slow`: share of steps and of time."""
    goal = statistics.mean(run[-1].psnr for run in points[slow])
    steps = statistics.mean(run[-1].step for run in points[slow])
    seconds = statistics.mean(run[-1].seconds for run in points[slow])
    for at in zip(*points[fast], strict=True):
        if statistics.mean(p.psnr for p in at) >= goal:
            took = statistics.mean(p.seconds for p in at)
            return (
                f"{fast.name} has the last PSNR of {slow.name} ({goal:.2f} dB) by step "
                f"{at[0].step}: {at[0].step / steps:.2f} of its steps, "
                f"{took / seconds:.2f} of its time"
            )
    return f"{fast.name} does not reach the last PSNR of {slow.name} ({goal:.2f} dB)"


@torch.inference_mode()
def pictures(setting: Setting, entries: Sequence[Entry], number: int) -> Tensor:
    """A row of inputs, then one of reconstructions for each entry's first seed; uint8 [3, H, W]."""
    models = [AutoEncoderKL.from_checkpoint(setting.run_folder(e, 0)) for e in entries]
    dataset = _validation_set(setting.run_config(entries[0], 0))
    chosen = range(0, len(dataset), max(1, len(dataset) // number))[:number]
    images = [_image(dataset, i) for i in chosen]
    shown = [*images, *(model(x, sample_posterior=False)[0] for model in models for x in images)]
    cells = [as_picture(as_saved(x[0]), models[0].to_rgb) for x in shown]
    return image_grid(cells, len(images))


def _validation_set(config: RunConfig) -> ImageDataset:
    ddconfig = config.model.params.ddconfig
    _, dataset = build_datasets(
        config.data, ddconfig.in_channels, ddconfig.resolution, config.training.seed
    )
    if dataset is None:
        raise ValueError("a comparison needs validation images: set data.validation.root=FOLDER")
    return dataset


@torch.inference_mode()
def _measure(
    model: AutoEncoderKL, dataset: ImageDataset, perceptual: LPIPS
) -> tuple[float, float, float]:
    """Mean PSNR (dB), SSIM and perceptual distance of the mode's reconstructions."""
    figures = []
    for i in range(len(dataset)):
        image = _image(dataset, i)
        reconstruction = model(image, sample_posterior=False)[0].clamp(-1.0, 1.0)
        figures.append([f(image, reconstruction).item() for f in (psnr, ssim, perceptual)])
    mean_psnr, mean_ssim, mean_perceptual = map(statistics.mean, zip(*figures, strict=True))
    return mean_psnr, mean_ssim, mean_perceptual


def _image(dataset: ImageDataset, index: int) -> Tensor:
    """An image, [1, C, H, W] in [-1, 1]."""
    return normalized(dataset[0, index, index].image[None].contiguous())


def _read_points(run: Path) -> Iterator[Point]:
    """The validations of a run; the seconds are those of training alone."""
    seconds, seen = 0.0, 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        figures: dict[str, Any] = json.loads(line)
        if "images_per_second" in figures:
            seconds += (figures["images_seen"] - seen) / figures["images_per_second"]
            seen = figures["images_seen"]
        elif "val/psnr" in figures:
            perceptual = float(figures.get("val/p_loss", math.nan))
            yield Point(
                figures["step"], seconds, figures["val/psnr"], figures["val/ssim"], perceptual
            )


def _mean_and_deviation(values: Sequence[float], digits: int) -> str:
    if math.isnan(values[0]):
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
