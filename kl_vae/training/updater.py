"""The update of one network's parameters from their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kl_vae.optimizer import OptimizerConfig, build_optimizer, set_learning_rate
from kl_vae.training.distributed import Ranks

# the run is lost, not unlucky, when this many steps in a row give no finite gradient
MAX_SKIPPED_STEPS = 10


@dataclass
class Updater:
    """Parameters, their optimiser and their gradient scaler (which does nothing but in fp16).

    Attributes:
        parameters: all that are updated.
        config: of the optimiser.
        section: of the config file, for errors.
        learning_rate: of the last step.
        skipped: steps left out for want of a finite gradient.
    """

    parameters: list[nn.Parameter]
    config: OptimizerConfig
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    section: str
    learning_rate: float = 0.0
    skipped: int = 0
    _skipped_in_a_row: int = 0

    @classmethod
    def build(
        cls, parameters: list[nn.Parameter], config: OptimizerConfig, precision: str, section: str
    ) -> Updater:
        """Build the optimiser and the scaler over `parameters`."""
        scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=precision == "fp16")
        return cls(parameters, config, build_optimizer(parameters, config), scaler, section)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar, scaled."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self, ranks: Ranks, step: int, total_steps: int) -> tuple[Tensor, bool]:
        """Unscale, clip and step; without a finite gradient on any rank all leave the step out.

        Returns:
            The gradient's norm before clipping, a scalar, and whether the step was taken.

        Raises:
            RuntimeError: too many steps in a row without a finite gradient.
        """
        self.learning_rate = set_learning_rate(self.optimizer, step, total_steps, self.config)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_grad_norm, norm)
        finite = not ranks.any(not norm.isfinite())
        if finite or self.scaler.is_enabled():  # the scaler leaves a step out by itself
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise RuntimeError(
                f"{MAX_SKIPPED_STEPS} steps in a row had no finite gradient; lower "
                f"{self.section}.learning_rate, or set training.precision to bf16 or fp32"
            )
        return norm.detach(), finite

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on: tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.skipped = content["skipped"]
        self._skipped_in_a_row = content["skipped_in_a_row"]
