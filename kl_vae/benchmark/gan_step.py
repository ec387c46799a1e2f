"""The GAN step of a run on random weights, to be measured."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kl_vae.ddconfig import DDConfig
from kl_vae.optim.config import DiscriminatorOptimizerConfig, OptimizerConfig
from kl_vae.runtime.distributed import Ranks
from kl_vae.training.config import ModelConfig, ModelParams, RunConfig, TrainingConfig
from kl_vae.training.guards import BadImages
from kl_vae.training.prepare import build_model, build_state, wrap
from kl_vae.training.step import TrainingStep

# as published, but for a rate so small that all steps that are timed work on the same weights
_ADAM: dict[str, Any] = {
    "name": "adam",
    "betas": (0.5, 0.9),
    "eps": 1e-8,
    "learning_rate": 1e-6,
    "clip_grad_norm": None,
}


def build_step(
    ddconfig: DDConfig,
    embed_dim: int | None,
    device: torch.device,
    batch_size: int,
    perceptual: str | nn.Module = "vgg",
    perceptual_features: str | Path | None = None,
) -> TrainingStep:
    """Build our step in fp32 (see `compare_steps`)."""
    with tempfile.TemporaryDirectory() as folder:
        if perceptual == "vgg" and perceptual_features is None:
            perceptual_features = write_random_vgg(Path(folder) / "vgg16.pth")
        params = {
            "disc_start": 0,
            "disc_in_channels": ddconfig.out_ch,
            "disc_weight": 0.5,
            "kl_weight": 1e-6,
            "learn_logvar": False,  # no published optimiser holds it
            "perceptual": perceptual,
            "perceptual_linear": False,
            "perceptual_features": perceptual_features,
        }
        model_params = ModelParams(
            ddconfig=dataclasses.replace(ddconfig, dropout=0.0),
            embed_dim=embed_dim,
            lossconfig={"target": "lpips_with_discriminator", "params": params},
        )
        config = RunConfig(
            model=ModelConfig(params=model_params),
            optimizer=OptimizerConfig(**_ADAM),
            discriminator_optimizer=DiscriminatorOptimizerConfig(**_ADAM),
            training=TrainingConfig(global_batch_size=batch_size, max_steps=1),
        )
        ranks = Ranks(0, 1, device)
        model = build_model(config, ranks, resuming=False)
    state = build_state(config, model, {}, "")
    bad_images = BadImages(None, ranks, number=batch_size, max_fraction=0.0)
    return TrainingStep(state, *wrap(model, ranks), config, ranks, 1, bad_images)


def write_random_vgg(path: Path) -> Path:
    """Write random weights of VGG16's features, as LPIPS reads them; return the path."""
    import torchvision

    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).features.state_dict()
    torch.manual_seed(0)
    tensors = {
        key: torch.randn(x.shape) * math.sqrt(2.0 / x[0].numel())  # He et al. 2015
        if x.ndim == 4
        else torch.zeros(x.shape)
        for key, x in shapes.items()
    }
    torch.save(tensors, path)
    return path
