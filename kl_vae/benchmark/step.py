"""One GAN step of ours against the published sequence of operations, on the same modules.

B batch, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from kl_vae.benchmark.flops import MatrixProduct, count_gan_flops
from kl_vae.benchmark.gan_step import build_step
from kl_vae.benchmark.measurement import MATRIX_PRODUCT
from kl_vae.benchmark.published import PublishedStep, gradient_difference, noting_gradients
from kl_vae.benchmark.timing import Passes, Timing, alternate, counting
from kl_vae.benchmark.twin import why_no_twin
from kl_vae.data import Batch
from kl_vae.ddconfig import DDConfig
from kl_vae.losses.lpips import LPIPS
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.randomness import generator_for
from kl_vae.training.step import latent_noise

MAX_DIFFERENCE = 1e-3  # of float32 gradients; above it the two steps are not the same step


@dataclass(frozen=True)
class StepResult:
    """What was measured of one of the steps: its time, and its passes by the network."""

    timing: Timing
    passes: dict[str, Passes]


@dataclass(frozen=True)
class StepComparison:
    """Both steps.

    Attributes:
        published: as latent-diffusion runs it.
        ours: as training runs it.
        diffusers: the published sequence with diffusers' modules; None: it cannot be had.
        difference: of their gradients (see `gradient_difference`).
        flops: operations that our step needs (see `count_gan_flops`).
        product_rate: FLOP/s of a large matrix product, timed by turns with both.
    """

    published: StepResult
    ours: StepResult
    diffusers: StepResult | None
    difference: float
    flops: int
    product_rate: float

    @property
    def ratio(self) -> float:
        """How many times as long the published step takes, by the medians."""
        return self.published.timing.median / self.ours.timing.median

    @property
    def share(self) -> float:
        """Our rate as a part of the matrix product's."""
        return self.flops / self.ours.timing.median / self.product_rate

    def markdown(self) -> str:
        """A table, and below it what its columns mean."""
        networks = list(self.ours.passes)
        lines = [
            f"| step | median s | low to high s | times ours | {' | '.join(networks)} |",
            f"|---|---|---|---|{'---|' * len(networks)}",
        ]
        results = {"published": self.published, "ours": self.ours}
        if self.diffusers is not None:
            results = {"published, diffusers' modules": self.diffusers, **results}
        for name, result in results.items():
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
                f"Our step needs {self.flops / 1e9:.4g} GFLOP (convolutions and matrix products), "
                f"at {self.share:.0%} of a matrix product's rate, which is "
                f"{self.product_rate / 1e9:.0f} GFLOP/s.",
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
    assert isinstance(published.model, AutoEncoderKL)
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
    product = MatrixProduct(device, precision)
    candidates: dict[str, Callable[[], object]] = {
        "published": lambda: published(batch),
        "ours": lambda: ours(repeat(batch)),
        MATRIX_PRODUCT: product,
    }
    if why_no_twin(ddconfig, embed_dim) is None:
        theirs = PublishedStep.with_twin(ours)
        candidates["diffusers"] = lambda: theirs(batch)
    timings = alternate(candidates, repeats, device)
    return StepComparison(
        StepResult(timings["published"], published_passes),
        StepResult(timings["ours"], our_passes),
        StepResult(timings["diffusers"], published_passes) if "diffusers" in timings else None,
        difference,
        count_gan_flops(ours.state.model, batch_size, size),
        product.flops / timings[MATRIX_PRODUCT].median,
    )


def _networks(model: AutoEncoderKL) -> dict[str, nn.Module]:
    """Where the passes are counted; the first layer of LPIPS's network sees each of its images."""
    assert model.adversary is not None
    perceptual = model.adversary.perceptual_loss
    first = perceptual.features[0] if isinstance(perceptual, LPIPS) else perceptual
    assert isinstance(first, nn.Module)
    discriminator = model.adversary.discriminator
    return {"autoencoder": model.encoder, "LPIPS": first, "discriminator": discriminator}
