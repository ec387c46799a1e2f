"""The update of one network's parameters from their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kl_vae.optim.config import OptimizerConfig, build_optimizer, set_learning_rate


@dataclass
class Updater:
    """Parameters, their optimiser and their gradient scaler (which does nothing but in fp16).

    Attributes:
        parameters: all that are updated.
        config: of the optimiser.
        learning_rate: of the last step.
    """

    parameters: list[nn.Parameter]
    config: OptimizerConfig
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    learning_rate: float = 0.0

    @classmethod
    def build(
        cls, parameters: list[nn.Parameter], config: OptimizerConfig, precision: str
    ) -> Updater:
        """Build the optimiser and the scaler over `parameters`."""
        scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=precision == "fp16")
        return cls(parameters, config, build_optimizer(parameters, config), scaler)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar, scaled."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self) -> Tensor:
        """Undo the scaling of the gradient; return its norm, a scalar, not finite where it is not.

        Once a step, and before `update`.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return nn.utils.get_total_norm(gradients).detach()

    @property
    def scale_may_be_too_large(self) -> bool:
        """Whether a gradient that is not finite may be so for the scale's sake alone."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1.0

    def update(self, norm: Tensor, take: bool, step: int, total_steps: int) -> None:
        """Clip and step, or leave the step out.

        Args:
            norm: what `unscale` gave.
            take: the step, whose gradient is finite then.
            step: for the learning rate.
            total_steps: of the run.
        """
        self.learning_rate = set_learning_rate(self.optimizer, step, total_steps, self.config)
        if take:
            if self.config.clip_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_grad_norm, norm)
            self.scaler.step(self.optimizer)
        self.scaler.update()  # where the gradient was not finite the scale is halved
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on: tensors and plain values."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
