"""What a checkpoint of a run holds, and how a run is taken up from it."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kl_vae.model import AutoEncoderKL
from kl_vae.training.ema import WeightAverage
from kl_vae.training.guards import Skips
from kl_vae.training.updater import Updater

logger = logging.getLogger(__name__)

_KEYS = frozenset(
    {"model", "ema", "ema_updates", "updaters", "skips", "data_fingerprint", "step", "images_seen"}
    | {"best", "validated_step", "validation_fingerprint", "batches", "versions"}
)


@dataclass
class TrainingState:
    """Everything that a step changes. Order, crops and noise follow from the step's number.

    Attributes:
        model: with its loss.
        updater: of the autoencoder and its loss.
        config: of the run, as a checkpoint holds it.
        data_fingerprint: of the training images.
        validation_fingerprint: of the validation images; empty where there are none.
        discriminator_updater: where there is a discriminator.
        average: of the weights, where there is one.
        batches: see `kl_vae.training.global_batch`.
        step: optimisation steps taken.
        images_seen: in these steps.
        validated_step: of the last validation that was complete.
        best: monitor, value and step of the best validation.
        skips: steps that were left out.
    """

    model: AutoEncoderKL
    updater: Updater
    config: dict[str, Any]
    data_fingerprint: str
    validation_fingerprint: str = ""
    discriminator_updater: Updater | None = None
    average: WeightAverage | None = None
    batches: dict[str, int] = field(default_factory=dict)
    step: int = 0
    images_seen: int = 0
    validated_step: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    skips: Skips = field(default_factory=Skips)

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
            "skips": self.skips.state_dict(),
            "config": self.config,
            "data_fingerprint": self.data_fingerprint,
            "validation_fingerprint": self.validation_fingerprint,
            "batches": self.batches,
            "step": self.step,
            "images_seen": self.images_seen,
            "validated_step": self.validated_step,
            "best": self.best,
            "versions": self._versions(),
        }

    def not_finite(self) -> str | None:
        """The name of a parameter, averaged or not, or optimiser's tensor that is not finite."""
        average = {} if self.average is None else dict(self.average.model.named_parameters())
        optimizers = [updater.state_dict() for updater in self.updaters]
        everything = [dict(self.model.named_parameters()), {"ema": average}, optimizers]
        named = (pair for tree in everything for pair in _tensors(tree))
        return next((name for name, x in named if not _is_finite(x)), None)

    def restore(self, content: dict[str, Any], source: str) -> None:
        """Take up from a checkpoint's content; what differs harmlessly is named in the log.

        Raises:
            ValueError: it was made on other images, or by another version of this program.
        """
        if not _KEYS <= content.keys():
            raise ValueError(
                f"{source}: has no {', '.join(sorted(_KEYS - content.keys()))}, so that the run "
                "cannot go on from it; start in a new --run-dir with model.params.ckpt_path set "
                "to it"
            )
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
        self.validated_step = content["validated_step"]
        self.best = content["best"]
        self.skips.load_state_dict(content["skips"])
        for key, now in self._versions().items():
            before = content["versions"].get(key)
            if before != now:
                logger.info(
                    "resuming with %s %s, before it was %s: the last bits of numbers may differ",
                    *(key, now, before),
                )
        if content["validation_fingerprint"] != self.validation_fingerprint:
            logger.info(
                "the validation images are not those of before: val/ figures do not compare, "
                "and the best checkpoint is chosen anew"
            )
            self.best = {}

    def _versions(self) -> dict[str, str]:
        """What bit for bit the same numbers depend on beside the config."""
        device = self.model.get_last_layer().device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "device": name,
        }

    def note_best(self, monitor: str, value: float) -> None:
        """Remember this step if its figure is the best so far (psnr and ssim: the highest)."""
        if math.isnan(value):
            return
        higher = monitor.endswith(("psnr", "ssim"))
        before = self.best.get("value")
        if before is None or (value > before if higher else value < before):
            self.best = {"monitor": monitor, "value": value, "step": self.step}


def _is_finite(x: Tensor) -> bool:
    # a sum takes a tenth of the time; it may overflow where no element has
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, with their paths."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from _tensors(value, f"{path}.{key}" if path else str(key))
