"""Optimiser and learning-rate schedule; the learning rate depends only on the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kl_vae.optim.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of an optimiser.

    Attributes:
        name: adamw (Loshchilov & Hutter 2019), adam (Kingma & Ba 2015) as published, or muon
            (Jordan et al. 2024) for kernels and matrices with AdamW for the rest.
        learning_rate: learning rate after the warm-up; about 1e-4 to 1e-3 for adam and adamw, 0.01
            to 0.02 for muon.
        adamw_learning_rate: with muon, learning rate of norms, biases and scalars.
        betas: decay rates of the first and second moment.
        eps: added to the square root of the second moment. Some parameters have no effect (a bias
            before a group norm with one channel per group, the bias of attention keys), and their
            gradients are rounding noise: with 1e-8, Adam would amplify it to full steps that depend
            on the number of ranks.
        weight_decay: weight decay of convolution and linear weights; norms, biases and scalars are
            not decayed.
        warmup_steps: number of steps over which the learning rate increases linearly from 0.
        schedule: schedule after the warm-up: constant, or cosine to min_learning_rate at the end of
            the run.
        min_learning_rate: final learning rate of the cosine schedule.
        clip_grad_norm: maximum norm of the gradient of all parameters; null: no clipping.
    """

    name: Literal["adamw", "adam", "muon"] = "adamw"
    learning_rate: float = 1e-4
    adamw_learning_rate: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.99)
    eps: float = 1e-6
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    min_learning_rate: float = 0.0
    clip_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        errors = []
        for key in ("learning_rate", "adamw_learning_rate"):
            if getattr(self, key) <= 0:
                errors.append(f"{key}={getattr(self, key)}: must be above 0, such as 1.0e-4")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            errors.append(
                f"betas={list(self.betas)}: must be two numbers, each at least 0 and below 1"
            )
        for key in ("eps", "weight_decay", "warmup_steps"):
            if getattr(self, key) < 0:
                errors.append(f"{key}={getattr(self, key)}: must be 0 or more")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            errors.append(
                f"min_learning_rate={self.min_learning_rate}: must be between 0 and "
                f"learning_rate={self.learning_rate}"
            )
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            errors.append(
                f"clip_grad_norm={self.clip_grad_norm}: must be above 0, or null for no clipping"
            )
        if errors:
            raise ValueError("\n".join(errors))


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptimizerConfig(OptimizerConfig):
    """Settings of the discriminator's optimiser, with the published defaults."""

    name: Literal["adamw", "adam", "muon"] = "adam"
    betas: tuple[float, ...] = (0.5, 0.9)


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Build the optimiser for all trainable parameters, in two groups: matrices and other tensors.

    Matrices are the weights of convolutions and linear layers. `initial_lr` of a group is its peak
    learning rate.
    """
    trainable = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group["lr"] = config.learning_rate
    betas = (config.betas[0], config.betas[1])
    optimizer: torch.optim.Optimizer
    if config.name == "muon":
        groups[0]["orthogonalize"] = True
        groups[1]["lr"] = config.adamw_learning_rate
        optimizer = Muon(groups, betas=betas, eps=config.eps)
    else:
        kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
        fused = all(p.device.type in ("cuda", "cpu") for p in trainable)
        optimizer = kind(groups, betas=betas, eps=config.eps, fused=fused)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: OptimizerConfig
) -> float:
    """Set the learning rates for step `step` (from 0); return the rate of the first group."""
    rate = learning_rate_at(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * (group["initial_lr"] / config.learning_rate)
    return rate


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate for step `step` (from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)
