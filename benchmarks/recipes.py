"""Training recipes: quality against steps and against time, over several seeds.

Each recipe trains by `kl-vae train`, in an own process. PSNR, SSIM and the perceptual distance are
means over the validation images; those of the last step are measured alike for all, on the
posterior's mode. Overrides of the config follow the options, such as data.train.root=photos.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, parse, report
from torch import Tensor
from torchvision.utils import save_image

from kl_vae import AutoEncoderKL
from kl_vae.data import build_datasets, normalized
from kl_vae.losses.lpips import LPIPS
from kl_vae.metrics.similarity import psnr, ssim
from kl_vae.training.config import RunConfig

OBJECTIVE = (
    "model.params.ddconfig.zero_init_residual=false",
    "model.params.lossconfig.target=lpips_with_discriminator",
    "model.params.lossconfig.params={disc_start: 1000000000, kl_weight: 1.0e-6, "
    "learn_logvar: false, perceptual: squeeze, perceptual_linear: false, "
    "perceptual_weight: 0.1, disc_norm: group, disc_weight: 0.5, reduction: mean}",
)
MUON = (
    "optimizer={name: muon, learning_rate: 0.02, adamw_learning_rate: 3.0e-3, warmup_steps: 20, "
    "schedule: cosine}",
)
RECIPES: dict[str, tuple[str, ...]] = {
    # L1 + perceptual + KL as the first stages were published: Adam(0.5, 0.9) at a constant rate
    "published": (
        *OBJECTIVE,
        "model.params.lossconfig.params.reduction=sum",
        "optimizer={name: adam, betas: [0.5, 0.9], eps: 1.0e-8, clip_grad_norm: null}",
    ),
    # the same objective with Muon, warm-up and cosine
    "ours": (*OBJECTIVE, *MUON),
    "mse": (
        OBJECTIVE[0],
        "model.params.lossconfig={target: elbo, params: {kl_weight: 1.0e-6}}",
        *MUON,
    ),
    # as mse, until the perceptual loss and then the discriminator join in
    "gan": (
        *OBJECTIVE,
        *MUON,
        "model.params.lossconfig.params.reconstruction=mse",
        "model.params.lossconfig.params.perceptual_weight=0.02",
        "model.params.lossconfig.params.disc_num_layers=2",
        "discriminator_optimizer.learning_rate=5.0e-4",
    ),
}
PERCEPTUAL_START, DISC_START = 0.5, 0.6  # of the steps of a run of gan
IMAGES = 8  # images in the comparison
COLUMNS = {
    "recipe": "{recipe}",
    "step": "{step}",
    "seconds": "{seconds:.0f}",
    "PSNR, dB": "{psnr}",
    "SSIM": "{ssim}",
    "perceptual": "{perceptual}",
}


@dataclass(frozen=True)
class Entry:
    """A recipe, its number of steps, and its learning rate (None: the recipe's own)."""

    recipe: str
    steps: int
    learning_rate: float | None = None

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read RECIPE:STEPS or RECIPE:STEPS:LEARNING_RATE."""
        recipe, steps, *rate = text.split(":")
        if recipe not in RECIPES:
            raise ValueError(f"recipe {recipe!r}: give one of {', '.join(RECIPES)}")
        return cls(recipe, int(steps), float(rate[0]) if rate else None)

    @property
    def name(self) -> str:
        """The name in tables."""
        rate = "" if self.learning_rate is None else f" at {self.learning_rate:g}"
        return f"{self.recipe}{rate}"

    def overrides(self, features: Path, seed: int) -> list[str]:
        """Return what the recipe says about model, optimiser and length."""
        loss = "model.params.lossconfig.params"
        lines = [*RECIPES[self.recipe]]
        if self.recipe != "mse":
            lines.append(f"{loss}.perceptual_features={json.dumps(str(features))}")
        if self.recipe == "gan":
            lines.append(f"{loss}.perceptual_start={round(PERCEPTUAL_START * self.steps)}")
            lines.append(f"{loss}.disc_start={round(DISC_START * self.steps)}")
        if self.learning_rate is not None:
            lines.append(f"optimizer.learning_rate={self.learning_rate:.12e}")
        return [
            *lines,
            "model.params.monitor=null",
            f"training.seed={seed}",
            f"training.max_steps={self.steps}",
            f"training.validate_every_steps={max(1, self.steps // 6)}",
            f"training.save_every_steps={self.steps}",
        ]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train all recipes with all seeds, and report; return the rows."""
    parser = argument_parser(__doc__, repeats=1)
    parser.set_defaults(config="quickstart")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument(
        "--recipe", action="append", type=Entry.parse, metavar="RECIPE:STEPS[:RATE]", required=True
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--perceptual-features", type=Path, required=True, help="SqueezeNet 1.1")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    args = parse(parser, argv)

    perceptual = LPIPS("squeeze", linear=False, features=args.perceptual_features)
    points: dict[Entry, list[list[dict[str, float]]]] = {entry: [] for entry in args.recipe}
    shown: list[Tensor] = []
    for seed in range(args.seeds):
        for entry in args.recipe:
            overrides = [*entry.overrides(args.perceptual_features, seed), *args.overrides]
            run = args.out / f"{entry.name.replace(' at ', '_')}_{entry.steps}_seed{seed}"
            command = [sys.executable, "-m", "kl_vae", "train", args.config, *overrides]
            command += ["--run-dir", str(run), "--device", str(args.device)]
            subprocess.run(command, check=True)
            points[entry].append(read_points(run))
            last, images, reconstructions = measure(
                run, RunConfig.load(args.config, overrides), perceptual
            )
            points[entry][-1][-1] |= last
            if seed == 0:
                shown += reconstructions if shown else [*images, *reconstructions]
    # rows: inputs, then the reconstructions of each recipe
    columns = len(shown) // (1 + len(args.recipe))
    save_image(
        shown, args.out / "comparison.png", nrow=columns, value_range=(-1, 1), normalize=True
    )
    rows = [summary(entry, at) for entry, runs in points.items() for at in zip(*runs, strict=True)]
    report(args, f"Recipes on {args.config}, mean ± deviation of {args.seeds} seeds", COLUMNS, rows)
    return rows


def read_points(run: Path) -> list[dict[str, float]]:
    """Return the validations of a run; the seconds are those of training alone."""
    points, seconds, seen = [], 0.0, 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "images_per_second" in metrics:
            seconds += (metrics["images_seen"] - seen) / metrics["images_per_second"]
            seen = metrics["images_seen"]
        elif "val/psnr" in metrics:
            point = {"step": metrics["step"], "seconds": seconds, "psnr": metrics["val/psnr"]}
            point |= {"ssim": metrics["val/ssim"]}
            points.append({**point, "perceptual": metrics.get("val/p_loss", math.nan)})
    return points


@torch.inference_mode()
def measure(
    run: Path, config: RunConfig, perceptual: LPIPS
) -> tuple[dict[str, float], list[Tensor], list[Tensor]]:
    """Return the metrics of a run's last model, and some images with their reconstructions."""
    model = AutoEncoderKL.from_checkpoint(run)
    channels, resolution = model.config.in_channels, model.config.resolution
    _, dataset = build_datasets(config.data, channels, resolution, config.training.seed)
    if dataset is None:
        raise ValueError("no validation images: set data.validation.root=FOLDER")
    values, images, reconstructions = [], [], []
    for index in range(len(dataset)):
        image = normalized(dataset[0, index, index].image[None].contiguous())
        reconstruction = model(image, sample_posterior=False)[0].clamp(-1.0, 1.0)
        values.append([f(image, reconstruction).item() for f in (psnr, ssim, perceptual)])
        if index % max(1, len(dataset) // IMAGES) == 0 and len(images) < IMAGES:
            images.append(image[0])
            reconstructions.append(reconstruction[0])
    means = map(statistics.mean, zip(*values, strict=True))
    return dict(zip(("psnr", "ssim", "perceptual"), means, strict=True)), images, reconstructions


def summary(entry: Entry, at: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the row of one validation of a recipe: over the seeds."""

    def cell(key: str, digits: int) -> str:
        values = [point[key] for point in at]
        if math.isnan(values[0]):
            return ""
        mean = f"{statistics.mean(values):.{digits}f}"
        return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean

    row = {"recipe": entry.name, "step": at[0]["step"], "points": list(at)}
    row["seconds"] = statistics.mean(point["seconds"] for point in at)
    return (
        row
        | {"psnr": cell("psnr", 2), "ssim": cell("ssim", 3)}
        | {"perceptual": cell("perceptual", 3)}
    )


if __name__ == "__main__":
    main()
