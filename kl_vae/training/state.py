"""What a checkpoint of a run holds, and how a run is taken up from it."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kl_vae.files import write_text_atomically
from kl_vae.formats.checkpoint import (
    BEST,
    FOLDER,
    best_checkpoint,
    checkpoint_path,
    list_checkpoints,
    remove_checkpoint,
    write_checkpoint,
)
from kl_vae.model import AutoEncoderKL
from kl_vae.training.ema import WeightAverage
from kl_vae.training.updater import Updater


@dataclass
class TrainingState:
    """Everything that a step changes. Order, crops and noise follow from the step's number."""

    model: AutoEncoderKL
    updater: Updater  # of the autoencoder and its loss
    config: dict[str, Any]
    data_fingerprint: str
    discriminator_updater: Updater | None = None
    average: WeightAverage | None = None
    step: int = 0  # optimisation steps taken
    images_seen: int = 0
    best: dict[str, Any] = field(default_factory=dict)

    @property
    def updaters(self) -> list[Updater]:
        """The autoencoder's, and the discriminator's where there is one."""
        both = (self.updater, self.discriminator_updater)
        return [updater for updater in both if updater is not None]

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "ema_updates": 0 if self.average is None else self.average.updates,
            "updaters": [updater.state_dict() for updater in self.updaters],
            "config": self.config,
            "data_fingerprint": self.data_fingerprint,
            "step": self.step,
            "images_seen": self.images_seen,
            "best": self.best,
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        }

    def restore(self, content: dict[str, Any], source: str) -> None:
        """Take up from a checkpoint's content.

        Raises:
            ValueError: it was made on other images.
        """
        if content["data_fingerprint"] != self.data_fingerprint:
            raise ValueError(
                f"{source}: the training images are not those it was made on; restore the folder, "
                "or start in a new --run-dir with model.params.ckpt_path set to it"
            )
        self.model.load_state_dict(content["model"])
        if self.average is not None:
            self.average.load_state_dict(content["ema"], content["ema_updates"])
        for updater, saved in zip(self.updaters, content["updaters"], strict=True):
            updater.load_state_dict(saved)
        self.step = content["step"]
        self.images_seen = content["images_seen"]
        self.best = content["best"]

    def save(self, run: Path, keep: int) -> None:
        """Write the checkpoint of this step, then remove all but the newest `keep` and the best."""
        write_checkpoint(checkpoint_path(run, self.step), self.content())
        if self.best:
            best = {"checkpoint": checkpoint_path(run, self.best["step"]).name, **self.best}
            write_text_atomically(run / FOLDER / BEST, json.dumps(best, indent=2) + "\n")
        for path in list_checkpoints(run)[keep:]:
            if path != best_checkpoint(run):
                remove_checkpoint(path)

    def note_best(self, monitor: str, value: float) -> None:
        """Remember this step if its figure is the best so far (psnr and ssim: the highest)."""
        if math.isnan(value):
            return
        higher = monitor.endswith(("psnr", "ssim"))
        before = self.best.get("value")
        if before is None or (value > before if higher else value < before):
            self.best = {"monitor": monitor, "value": value, "step": self.step}
