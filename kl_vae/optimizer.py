"""The optimiser and its learning rate, as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        name: adamw (Loshchilov & Hutter 2019), or adam (Kingma & Ba 2015), as published.
        learning_rate: at its peak, after the warm-up.
        betas: decay of the first and second moment.
        eps: added to the square root of the second moment. Parameters that change nothing (a bias
            before a group norm, the bias of attention's keys) have gradients of rounding noise;
            a larger eps keeps them where they are.
        weight_decay: of the weights of convolutions and linear layers; norms, biases and scalars
            are not decayed.
        warmup_steps: over which the rate rises linearly from 0.
        schedule: after the warm-up constant, or cosine down to min_learning_rate at the last step.
        min_learning_rate: where the cosine ends.
        clip_grad_norm: bound on the norm of the whole gradient; null: no bound.
    """

    name: Literal["adamw", "adam"] = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    min_learning_rate: float = 0.0
    clip_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        errors = []
        if self.learning_rate <= 0:
            errors.append(f"learning_rate={self.learning_rate}: must be above 0, such as 1.0e-4")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            errors.append(f"betas={list(self.betas)}: two numbers, each at least 0 and below 1")
        for key in ("eps", "weight_decay", "warmup_steps"):
            if getattr(self, key) < 0:
                errors.append(f"{key}={getattr(self, key)}: must be 0 or more")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            errors.append(
                f"min_learning_rate={self.min_learning_rate}: between 0 and "
                f"learning_rate={self.learning_rate}"
            )
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            errors.append(f"clip_grad_norm={self.clip_grad_norm}: above 0, or null for no clipping")
        if errors:
            raise ValueError("\n".join(errors))


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Build the optimiser over all trainable parameters, in two groups: decayed and not."""
    trainable = [p for p in parameters if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2]
    others = [p for p in trainable if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=all(p.device.type in ("cuda", "cpu") for p in trainable),
    )


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)
