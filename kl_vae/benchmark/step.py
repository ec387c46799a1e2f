"""One GAN step of ours against the published sequence of operations, on the same modules.

B batch, C channels.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kl_vae.benchmark.published import PublishedStep, gradient_difference, noting_gradients
from kl_vae.benchmark.timing import Passes, Timing, alternate, counting
from kl_vae.data import Batch
from kl_vae.ddconfig import DDConfig
from kl_vae.distributed.ranks import Ranks
from kl_vae.losses.lpips import LPIPS
from kl_vae.model import AutoEncoderKL
from kl_vae.optimizer import DiscriminatorOptimizerConfig, OptimizerConfig
from kl_vae.randomness import generator_for
from kl_vae.training.bad_images import BadImages
from kl_vae.training.config import ModelConfig, ModelParams, RunConfig, TrainingConfig
from kl_vae.training.prepare import build_model, build_state, wrap
from kl_vae.training.step import TrainingStep, latent_noise

MAX_DIFFERENCE = 1e-3  # of float32 gradients; above it the two steps are not the same step

# as published, but for a rate so small that all steps that are timed work on the same weights
_ADAM: dict[str, Any] = {
    "name": "adam",
    "betas": (0.5, 0.9),
    "eps": 1e-8,
    "learning_rate": 1e-6,
    "clip_grad_norm": None,
}


@dataclass(frozen=True)
class StepResult:
    """What was measured of one of the steps: its time, and its passes by the network."""

    timing: Timing
    passes: dict[str, Passes]


@dataclass(frozen=True)
class StepComparison:
    """Both steps, and how far their gradients lie apart (see `gradient_difference`)."""

    published: StepResult
    ours: StepResult
    difference: float

    @property
    def ratio(self) -> float:
        """How many times as long the published step takes, by the medians."""
        return self.published.timing.median / self.ours.timing.median

    def markdown(self) -> str:
        """A table, and below it what its columns mean."""
        networks = list(self.ours.passes)
        lines = [
            f"| step | median s | low to high s | times ours | {' | '.join(networks)} |",
            f"|---|---|---|---|{'---|' * len(networks)}",
        ]
        for name, result in (("published", self.published), ("ours", self.ours)):
            ratio = result.timing.median / self.ours.timing.median
            passes = [f"{x.forward} + {x.backward}" for x in result.passes.values()]
            lines.append(f"| {name} | {result.timing.cells} | {ratio:.2f} | {' | '.join(passes)} |")
        return "\n".join(
            [
                *lines,
                "",
                f"{', '.join(networks)}: forward + backward passes a step, counted by hooks (the "
                "autoencoder's at its encoder).",
                f"In fp32 the autoencoder's gradients of both agree to {self.difference:.1e}.",
            ]
        )


def compare_steps(
    ddconfig: DDConfig,
    embed_dim: int | None,
    device: torch.device,
    *,
    size: int = 128,
    batch_size: int = 1,
    repeats: int = 5,
    precision: Literal["fp32", "bf16"] = "fp32",
    perceptual: str | nn.Module = "vgg",
    perceptual_features: str | Path | None = None,
) -> StepComparison:
    """Time the published step and ours by turns, on equal models and the same images.

    The model has random weights and no dropout; the discriminator counts from the first step on.

    Args:
        ddconfig: the architecture.
        embed_dim: channels of the latents; None: no quant convolutions.
        device: where to compute.
        size: side of the images in pixels, a multiple of f.
        batch_size: images a step, B.
        repeats: steps of each that are timed.
        precision: fp32 or bf16 (the gradients are compared in fp32 all the same).
        perceptual: vgg, or a module in LPIPS's place.
        perceptual_features: file of LPIPS's network; None: random weights, which cost the same.

    Raises:
        ValueError: images that the networks cannot take, or a file that cannot be used.
        RuntimeError: the gradients differ; the times would be those of different things.
    """
    ours = build_step(ddconfig, embed_dim, device, batch_size, perceptual, perceptual_features)
    published = PublishedStep.beside(ours)
    generator = generator_for("benchmark", size)
    images = torch.rand(batch_size, ddconfig.in_channels, size, size, generator=generator)
    batch = Batch(2.0 * images - 1.0, torch.arange(batch_size), ("-",) * batch_size, ())
    # that of our first step
    noise = latent_noise(ours.state.model, batch, "posterior", ours.config.training.seed, 0)

    with (
        counting(_networks(ours.state.model)) as our_passes,
        noting_gradients(ours.state.updater.optimizer) as our_gradients,
    ):
        ours(repeat(batch))
    with (
        counting(_networks(published.model)) as published_passes,
        noting_gradients(published.optimizer) as published_gradients,
    ):
        published(batch, noise)
    difference = gradient_difference(our_gradients, published_gradients)
    if not difference < MAX_DIFFERENCE:  # so is NaN
        raise RuntimeError(
            f"the autoencoder's gradients of both steps differ by {difference:.1e}, which is more "
            f"than rounding ({MAX_DIFFERENCE:.0e}): times of different things do not compare"
        )
    del our_gradients, published_gradients

    training = dataclasses.replace(ours.config.training, precision=precision)
    ours.config = dataclasses.replace(ours.config, training=training)
    published.precision = precision
    timings = alternate(
        {"published": lambda: published(batch), "ours": lambda: ours(repeat(batch))},
        repeats,
        device,
    )
    return StepComparison(
        StepResult(timings["published"], published_passes),
        StepResult(timings["ours"], our_passes),
        difference,
    )


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


def _networks(model: AutoEncoderKL) -> dict[str, nn.Module]:
    """Where the passes are counted; the first layer of LPIPS's network sees each of its images."""
    assert model.adversary is not None
    perceptual = model.adversary.perceptual_loss
    first = perceptual.features[0] if isinstance(perceptual, LPIPS) else perceptual
    assert isinstance(first, nn.Module)
    discriminator = model.adversary.discriminator
    return {"autoencoder": model.encoder, "LPIPS": first, "discriminator": discriminator}
