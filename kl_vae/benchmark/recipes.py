"""Training recipes side by side: quality against steps and against time, over several seeds."""

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

from kl_vae.data import ImageDataset, build_datasets
from kl_vae.inference.grid import image_grid
from kl_vae.inference.metrics import psnr, ssim
from kl_vae.inference.picture_files import as_picture, as_saved
from kl_vae.losses.lpips import LPIPS
from kl_vae.model import AutoEncoderKL
from kl_vae.training.config import RunConfig
from kl_vae.training.loop import train

logger = logging.getLogger(__name__)

# the objective of all that do not say otherwise
_OBJECTIVE = (
    "model.params.lossconfig.target=lpips_with_discriminator",
    "model.params.lossconfig.params={disc_start: 1000000000, kl_weight: 1.0e-6, "
    "learn_logvar: false, perceptual: squeeze, perceptual_linear: false, "
    "perceptual_weight: 0.1, disc_norm: group, disc_weight: 0.5, reduction: mean}",
)
_PLAIN_BLOCKS = "model.params.ddconfig.zero_init_residual=false"
_PERCEPTUAL = "model.params.lossconfig.params.perceptual_features"
_OURS = (
    *_OBJECTIVE,
    _PLAIN_BLOCKS,
    "optimizer={name: muon, learning_rate: 0.02, adamw_learning_rate: 3.0e-3, warmup_steps: 20, "
    "schedule: cosine}",
)
_PUBLISHED = (
    *_OBJECTIVE,
    "model.params.lossconfig.params.reduction=sum",
    _PLAIN_BLOCKS,
    "optimizer={name: adam, betas: [0.5, 0.9], eps: 1.0e-8, clip_grad_norm: null}",
)

# name -> what it says about model and optimiser
RECIPES: dict[str, tuple[str, ...]] = {
    # L1 + perceptual + KL as the first stages were published: Adam(0.5, 0.9) at a constant rate
    "published": _PUBLISHED,
    # the same objective with Muon, warm-up and cosine
    "ours": _OURS,
    "mse": (
        "model.params.lossconfig={target: elbo, params: {kl_weight: 1.0e-6}}",
        *_OURS[len(_OBJECTIVE) :],
    ),
    # as mse, until the perceptual loss and then the discriminator join in
    "gan": (
        *_OURS,
        "model.params.lossconfig.params.reconstruction=mse",
        "model.params.lossconfig.params.perceptual_weight=0.02",
        "model.params.lossconfig.params.disc_num_layers=2",
        "discriminator_optimizer.learning_rate=5.0e-4",
    ),
}
# of the steps of a run of gan
PERCEPTUAL_START, DISC_START = 0.5, 0.6


@dataclass(frozen=True)
class Entry:
    """One recipe of a comparison.

    Attributes:
        recipe: a name in RECIPES.
        steps: optimisation steps.
        learning_rate: None: the recipe's own.
    """

    recipe: str
    steps: int
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """How tables call it."""
        rate = "" if self.learning_rate is None else f" at {self.learning_rate:g}"
        return f"{self.recipe}{rate}"

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read RECIPE:STEPS or RECIPE:STEPS:LEARNING_RATE.

        Raises:
            ValueError: something else, or an unknown recipe.
        """
        name, _, numbers = text.partition(":")
        steps, _, rate = numbers.partition(":")
        try:
            entry = cls(name, int(steps), float(rate) if rate else None)
        except ValueError:
            entry = None
        if name not in RECIPES or entry is None or entry.steps < 1:
            raise ValueError(
                f"recipe {text!r}: write RECIPE:STEPS or RECIPE:STEPS:LEARNING_RATE, "
                f"with one of {', '.join(RECIPES)}"
            )
        return entry


@dataclass(frozen=True)
class Point:
    """Mean figures over the validation set after so many steps and seconds of training."""

    step: int
    seconds: float
    psnr: float  # dB
    ssim: float
    perceptual: float  # nan: not measured on the way


@dataclass(frozen=True)
class Setting:
    """What all entries share.

    Attributes:
        config: whose data and architecture they train.
        overrides: of it, such as data.train.root=FOLDER.
        features: the perceptual network's weights (SqueezeNet 1.1).
        out: where the runs go, one folder each.
        device: as for training.
    """

    config: str
    overrides: tuple[str, ...]
    features: Path
    out: Path
    device: str = "auto"

    def run_config(self, entry: Entry, seed: int) -> RunConfig:
        """The whole config of one run."""
        recipe = [*RECIPES[entry.recipe]]
        if entry.recipe != "mse":
            recipe.append(f"{_PERCEPTUAL}={json.dumps(str(self.features))}")
        if entry.recipe == "gan":
            for key, share in (("perceptual", PERCEPTUAL_START), ("disc", DISC_START)):
                start = round(share * entry.steps)
                recipe.append(f"model.params.lossconfig.params.{key}_start={start}")
        if entry.learning_rate is not None:
            recipe.append(f"optimizer.learning_rate={entry.learning_rate!r}")
        length = [
            "model.params.monitor=null",
            f"training.seed={seed}",
            f"training.max_steps={entry.steps}",
            f"training.validate_every_steps={max(1, entry.steps // 6)}",
            f"training.save_every_steps={entry.steps}",
        ]
        return RunConfig.load(self.config, [*recipe, *self.overrides, *length])


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
            config, run = setting.run_config(entry, seed), run_folder(setting, entry, seed)
            logger.info("%s, seed %d: %d steps", entry.name, seed, entry.steps)
            train(config, run, setting.device)
            points[entry].append([*_read_points(run)])
            # the last point is measured alike for all, on the posterior's mode
            model = AutoEncoderKL.from_checkpoint(run)
            last = points[entry][-1][-1]
            figures = _measure(model, _validation_set(config), perceptual)
            points[entry][-1][-1] = Point(last.step, last.seconds, *figures)
    return points


def run_folder(setting: Setting, entry: Entry, seed: int) -> Path:
    """Where a run is kept."""
    return setting.out / f"{entry.name.replace(' at ', '_')}_{entry.steps}_seed{seed}"


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
    models = [AutoEncoderKL.from_checkpoint(run_folder(setting, e, 0)) for e in entries]
    dataset = _validation_set(setting.run_config(entries[0], 0))
    chosen = range(0, len(dataset), max(1, len(dataset) // number))[:number]
    images = [dataset[0, i, i].image[None] for i in chosen]
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
        image = dataset[0, i, i].image[None]
        reconstruction = model(image, sample_posterior=False)[0].clamp(-1.0, 1.0)
        figures.append([f(image, reconstruction).item() for f in (psnr, ssim, perceptual)])
    mean_psnr, mean_ssim, mean_perceptual = map(statistics.mean, zip(*figures, strict=True))
    return mean_psnr, mean_ssim, mean_perceptual


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
