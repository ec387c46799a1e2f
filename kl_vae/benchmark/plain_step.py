"""The plain training step, MSE and KL: ours against one with diffusers' modules.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.accelerate import accelerate_as
from kl_vae.benchmark.twin import twin_of
from kl_vae.ddconfig import DDConfig
from kl_vae.model import AutoEncoderKL
from kl_vae.optim.config import OptimizerConfig, build_optimizer
from kl_vae.runtime.device import autocast
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.randomness import generator_for
from kl_vae.training.config import ModelConfig, ModelParams, RunConfig, TrainingConfig
from kl_vae.training.prepare import build_model

DIFFUSERS = "diffusers"
KL_WEIGHT = 1e-6
RATE = 1e-6  # so small that all steps that are timed work on the same weights

# images [B, C, H, W], noise [B, z, h, w] -> reconstruction [B, C, H, W], KL [B] in nats
PLAIN = "ours, plain modules"

# the keys of TrainingConfig that make up each of our ways
STEP_WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "ours, without Winograd": {"winograd": False},
    "ours, checkpointing none": {"activation_checkpointing": "none"},
    "ours": {},
    "ours, checkpointing blocks": {"activation_checkpointing": "blocks"},
}

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class PlainStep:
    """Forward, MSE + KL_WEIGHT * KL, backward, and an update of the parameters.

    Attributes:
        forward: what is trained.
        optimizer: over its parameters.
        device: where the images are.
        precision: fp32, bf16, or fp16 with a gradient scaler; by autocast.
    """

    forward: Forward
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str = "fp32"
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        """A scalar, of images [B, C, H, W] and the posterior's noise [B, z, h, w]."""
        with autocast(self.device, self.precision):
            reconstruction, kl = self.forward(images, noise)
        return F.mse_loss(reconstruction.float(), images) + KL_WEIGHT * kl.float().mean()

    def __call__(self, images: Tensor, noise: Tensor) -> None:
        """Take a step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(self.loss(images, noise)).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()


def our_forward(model: nn.Module) -> Forward:
    """Of our model, or of what it is wrapped in."""

    def forward(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        reconstruction, posterior = model(images, noise=noise)
        return reconstruction, posterior.kl()

    return forward


def their_forward(twin: Any) -> Forward:
    """Of diffusers' module."""

    def forward(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = twin.encode(images).latent_dist
        z = posterior.mean + posterior.std * noise
        return twin.decode(z).sample, posterior.kl()

    return forward


def build_ours(
    ddconfig: DDConfig, embed_dim: int | None, device: torch.device, **training: Any
) -> AutoEncoderKL:
    """Our model as a run with these keys of TrainingConfig builds it; the same weights always."""
    params = ModelParams(ddconfig=dataclasses.replace(ddconfig, dropout=0.0), embed_dim=embed_dim)
    config = RunConfig(
        model=ModelConfig(params=params), training=TrainingConfig(max_steps=1, **training)
    )
    return build_model(config, Ranks(0, 1, device), resuming=False)


def build_way(
    way: str, ddconfig: DDConfig, embed_dim: int | None, device: torch.device
) -> AutoEncoderKL:
    """Our model as one of STEP_WAYS has it; the same weights always."""
    model = build_ours(ddconfig, embed_dim, device, **STEP_WAYS[way])
    if way == PLAIN:
        accelerate_as("off", model).set_activation_checkpointing(None)
    return model


def our_optimizer(model: AutoEncoderKL) -> torch.optim.Optimizer:
    """AdamW as training builds it."""
    return build_optimizer(model.parameters(), OptimizerConfig(learning_rate=RATE))


def their_steps(
    model: AutoEncoderKL, device: torch.device, precision: str
) -> dict[str, tuple[nn.Module, PlainStep]]:
    """Steps of diffusers' modules with the weights of ours: as its users write them, and faster.

    The first has torch's own choice of AdamW, the second its fused kernel and channels_last.
    """
    twin, faster = twin_of(model).train(), twin_of(model).train()
    faster = faster.to(memory_format=torch.channels_last)
    plain = torch.optim.AdamW(twin.parameters(), lr=RATE)
    fused = torch.optim.AdamW(faster.parameters(), lr=RATE, fused=device.type in ("cuda", "cpu"))
    return {
        DIFFUSERS: (twin, PlainStep(their_forward(twin), plain, device, precision)),
        f"{DIFFUSERS}, channels_last, fused AdamW": (
            faster,
            PlainStep(their_forward(faster), fused, device, precision),
        ),
    }


def step_input(
    ddconfig: DDConfig, embed_dim: int | None, batch_size: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] in [-1, 1] and noise [B, z, h, w], always the same."""
    generator = generator_for("benchmark", batch_size, size)
    images = 2.0 * torch.rand(batch_size, ddconfig.in_channels, size, size, generator=generator)
    side = size // ddconfig.downsampling_factor
    channels = ddconfig.z_channels if embed_dim is None else embed_dim
    noise = torch.randn(batch_size, channels, side, side, generator=generator)
    return (images - 1.0).to(device), noise.to(device)
