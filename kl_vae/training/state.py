"""What a run trains and counts: all that a checkpoint holds, and how it is restored."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from kl_vae.checkpoints.torch_file import one_line
from kl_vae.model import AutoEncoderKL
from kl_vae.optim.config import OptimizerConfig, build_optimizer
from kl_vae.optim.muon import Muon
from kl_vae.runtime.memory import is_out_of_memory
from kl_vae.runtime.published_config import section_at
from kl_vae.runtime.schema import printable
from kl_vae.training.ema import WeightAverage
from kl_vae.training.guards import Skips

logger = logging.getLogger(__name__)

# keys of a checkpoint from which a run resumes, and the types of their values
_KEYS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "skips", "config", "best", "batches", "versions"), dict),
    **dict.fromkeys(("ema_updates", "step", "images_seen", "validated_step"), int),
    **dict.fromkeys(("data_fingerprint", "validation_fingerprint"), str),
    "ema": (dict, type(None)),
    "updaters": list,
}


def check_content(content: Mapping[str, Any], source: str) -> None:
    """Check that a checkpoint has the plain values that a run needs to resume from it.

    Raises:
        ValueError: a value is missing, or impossible.
    """
    otherwise = "start in a new --run-dir with model.params.ckpt_path set to it"
    if not _KEYS.keys() <= content.keys():
        raise ValueError(
            f"{source}: has no {', '.join(sorted(_KEYS.keys() - content.keys()))}, so that the run "
            f"cannot resume from it; {otherwise}"
        )
    values = {key: content[key] for key in _KEYS}
    wrong = [key for key, kind in _KEYS.items() if not isinstance(values[key], kind)]
    if not wrong:
        counts = {key: x for key, x in values.items() if _KEYS[key] is int}
        counts |= {**values["skips"], **values["batches"]}
        wrong = [key for key, x in counts.items() if type(x) is not int or not _is_count(key, x)]
        if values["best"] and {k: type(x) for k, x in values["best"].items()} != _BEST:
            wrong.append("best")
    if wrong:
        raise ValueError(
            f"{source}: damaged, since {printable(str(wrong[0]))} is no value of a run, which "
            f"cannot resume from it; restore it from a backup, or {otherwise}"
        )


_BEST = {"monitor": str, "value": float, "step": int}


def _is_count(key: str, number: int) -> bool:
    """Return whether a number is a possible count."""
    return (-1 if key == "validated_step" else 0) <= number < 1 << 53


@dataclass
class Network:
    """Parameters, optimiser and scaler of a trained network: autoencoder or discriminator.

    Attributes:
        parameters: the trained ones.
        config: the optimiser's.
        optimizer: updates the parameters.
        scaler: scales the loss in fp16, otherwise disabled.
    """

    parameters: list[nn.Parameter]
    config: OptimizerConfig
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @classmethod
    def build(
        cls, parameters: list[nn.Parameter], config: OptimizerConfig, precision: str
    ) -> Network:
        """Build the optimiser and the scaler of `parameters`; precision: fp32, bf16 or fp16."""
        scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=precision == "fp16")
        return cls(parameters, config, build_optimizer(parameters, config), scaler)


@dataclass
class TrainingState:
    """Everything that a step changes. Order, crops and noise are functions of the step.

    Attributes:
        model: the autoencoder with its loss.
        autoencoder: its parameters and those of the loss, without a discriminator's.
        config: of the run, as a checkpoint holds it.
        data_fingerprint: of the training images.
        validation_fingerprint: of the validation images; empty if there are none.
        discriminator: None without one.
        average: moving average of the weights, or None.
        batches: division of a step's images, see `divide_batch`.
        step: optimisation steps taken.
        images_seen: images in these steps.
        validated_step: of the last complete validation. A checkpoint is saved before the validation
            of its step, and does not know it.
        best: monitor, value and step of the best validation.
        skips: counts of skipped steps.
    """

    model: AutoEncoderKL
    autoencoder: Network
    config: dict[str, Any]
    data_fingerprint: str
    validation_fingerprint: str = ""
    discriminator: Network | None = None
    average: WeightAverage | None = None
    batches: dict[str, int] = field(default_factory=dict)
    step: int = 0
    images_seen: int = 0
    validated_step: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    skips: Skips = field(default_factory=Skips)

    @property
    def networks(self) -> list[Network]:
        """The autoencoder, and the discriminator if there is one."""
        both = (self.autoencoder, self.discriminator)
        return [network for network in both if network is not None]

    def content(self) -> dict[str, Any]:
        """Return the content of a checkpoint: tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "ema_updates": 0 if self.average is None else self.average.updates,
            "updaters": [
                {"optimizer": n.optimizer.state_dict(), "scaler": n.scaler.state_dict()}
                for n in self.networks
            ],
            "skips": asdict(self.skips),
            "config": self.config,
            "data_fingerprint": self.data_fingerprint,
            "validation_fingerprint": self.validation_fingerprint,
            "batches": self.batches,
            "step": self.step,
            "images_seen": self.images_seen,
            "validated_step": self.validated_step,
            "best": self.best,
            "versions": self.environment(),
        }

    def restore(self, content: dict[str, Any], source: str) -> None:
        """Load a checkpoint's content; harmless differences are logged.

        Raises:
            ValueError: it was made with other images or by another version of this program, or its
                tensors are not those of this run.
        """
        check_content(content, source)
        if content["data_fingerprint"] != self.data_fingerprint:
            raise ValueError(
                f"{source}: was made on other training images; restore the folder, or start in a "
                "new --run-dir with model.params.ckpt_path set to it"
            )
        try:
            self._restore_tensors(content)
            self.skips = Skips(**content["skips"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            # torch and its optimisers raise many different types for what does not fit
            raise ValueError(
                f"{source}: does not fit this run ({one_line(' '.join(str(error).split()))}); "
                "restore it from a backup, or start in a new --run-dir"
            ) from error
        self.step = content["step"]
        self.images_seen = content["images_seen"]
        self.validated_step = content["validated_step"]
        self.best = content["best"]
        for key, now in self.environment().items():
            before = content["versions"].get(key)
            if before is not None and before != now:
                logger.warning(
                    "resuming with %s %s instead of %s: results may differ by rounding",
                    key,
                    now,
                    before,
                )
        if content["validation_fingerprint"] != self.validation_fingerprint:
            logger.info(
                "the validation images have changed: val/ metrics do not compare with those of "
                "before, and the best checkpoint is selected again"
            )
            self.best = {}

    def _restore_tensors(self, content: Mapping[str, Any]) -> None:
        """Load the weights, their average, and what the optimisers keep."""
        self.model.load_state_dict(content["model"])
        if self.average is not None and content["ema"] is not None:
            self.average.load_state_dict(content["ema"], content["ema_updates"])
        for network, saved in zip(self.networks, content["updaters"], strict=True):
            self._restore_network(network, saved, content["config"])

    def note_validation(self, value: float | None) -> None:
        """Record the validation of this step; `value` is the monitored metric."""
        self.validated_step = self.step
        monitor = self.model.monitor
        if monitor is None or value is None or math.isnan(value):
            return
        higher_is_better = monitor.endswith(("psnr", "ssim"))
        best = self.best.get("value")
        if best is None or (value > best if higher_is_better else value < best):
            self.best = {"monitor": monitor, "value": value, "step": self.step}

    def not_finite(self) -> str | None:
        """Return the name of a parameter or optimiser's tensor that is not finite, or None."""
        average = {} if self.average is None else dict(self.average.model.named_parameters())
        updaters = [{"optimizer": n.optimizer.state_dict()} for n in self.networks]
        everything = [dict(self.model.named_parameters()), {"ema": average}, updaters]
        named = (pair for tree in everything for pair in _tensors(tree))
        return next((name for name, x in named if not _is_finite(x)), None)

    def _restore_network(
        self, network: Network, saved: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Load an optimiser and a scaler; settings are those of the config now.

        If other parameters are frozen than before, those that were trained keep their state.
        """
        optimizer = network.optimizer
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        state = saved["optimizer"]
        if network is self.autoencoder:
            freeze = section_at(config, "training").get("freeze") or ()
            before = trained_groups(self.model, freeze)
            state = _for_groups(state, before, trained_groups(self.model, None))
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(values)
        _check_moments(optimizer)
        if network.scaler.is_enabled() and saved["scaler"]:
            network.scaler.load_state_dict(saved["scaler"])

    def environment(self) -> dict[str, str]:
        """Return the software and hardware that results depend on bit for bit."""
        device = self.model.get_last_layer().device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "device": name,
            "threads": str(torch.get_num_threads()),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }


def trained_groups(model: AutoEncoderKL, freeze: Iterable[str] | None) -> list[list[str]]:
    """Return the names of the trained parameters in the two groups of `build_optimizer`.

    Args:
        model: the autoencoder.
        freeze: patterns of frozen names; None: what is frozen now.
    """
    excluded: set[nn.Parameter] = set()
    if model.adversary is not None:
        excluded = set(model.adversary.discriminator.parameters())

    def is_trained(name: str, p: nn.Parameter) -> bool:
        if freeze is None or name.startswith("loss."):
            return p.requires_grad
        return not any(fnmatchcase(name, pattern) for pattern in freeze)

    trained = [
        (name, p)
        for name, p in model.named_parameters()
        if p not in excluded and is_trained(name, p)
    ]
    return [[name for name, p in trained if (p.ndim >= 2) == matrix] for matrix in (True, False)]


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimiser's state is that of its parameters, which torch does not.

    Raises:
        ValueError: it is not.
    """
    adam = {"step", "exp_avg", "exp_avg_sq"}
    for group in optimizer.param_groups:
        names = adam
        if isinstance(optimizer, Muon):
            names = {"momentum"} if group["orthogonalize"] else {"step", "mean", "square"}
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for name, x in state.items():
                shape = x.shape if isinstance(x, Tensor) else None
                steps = name == "step" and float(x) >= 0 and shape in (None, ())
                if not steps and (shape != p.shape or x.dtype != p.dtype):
                    raise ValueError(f"{name} of an optimizer is not that of a parameter")
            if state and state.keys() != names:
                raise ValueError(f"an optimizer has {', '.join(map(str, state))} of a parameter")


def _for_groups(
    saved: dict[str, Any], before: list[list[str]], now: list[list[str]]
) -> dict[str, Any]:
    """Return an optimiser's state for other groups of parameters; those that are new have none."""
    if before == now:
        return saved
    numbers = {name: i for i, name in enumerate(name for group in before for name in group)}
    names = [name for group in now for name in group]
    state = {
        i: saved["state"][numbers[name]]
        for i, name in enumerate(names)
        if numbers.get(name) in saved["state"]
    }
    groups, start = [], 0
    for group, members in zip(saved["param_groups"], now, strict=True):
        groups.append({**group, "params": list(range(start, start + len(members)))})
        start += len(members)
    return {"state": state, "param_groups": groups}


def _is_finite(x: Tensor) -> bool:
    # summing takes a tenth of the time, but may overflow for finite elements
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts and lists, with their paths."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from _tensors(value, f"{path}.{key}" if path else str(key))
