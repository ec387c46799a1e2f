"""Decode latents drawn from the prior N(0, I).

What these pictures mean: the decoder is shown raw latents of the prior, as nothing but the KL term
ties the posteriors to it. An autoencoder with the small kl_weight of latent diffusion is no
generator: texture without things is what it gives, and that the pictures are neither grey nor
saturated is what to look for. Latents with structure come from a diffusion model trained on top.

z latent channels, h = w = size / f.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kl_vae.inference.coding import decode_latents
from kl_vae.inference.progress import units_of
from kl_vae.inference.tiling import Tiling
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.randomness import generator_for

WHOLE = Tiling(mode="whole")


def check_size(size: int, factor: int) -> None:
    """Check the side of the images to sample.

    Raises:
        ValueError: `factor` (f) does not divide it.
    """
    if size < 1 or size % factor:
        nearest = max(1, round(size / factor)) * factor
        raise ValueError(f"size={size}: must be a multiple of {factor}; give {nearest}")


def prior_latents(model: AutoEncoderKL, size: int, seed: int, index: int) -> Tensor:
    """The latents [z, h, w] of image `index`, drawn from N(0, I)."""
    side = size // model.downsampling_factor
    generator = generator_for("sample", seed, index)
    return torch.randn((model.latent_channels, side, side), generator=generator)


def sample_prior(
    model: AutoEncoderKL,
    number: int,
    size: int,
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "fp32",
    tiling: Tiling = WHOLE,
) -> Iterator[Tensor]:
    """Yield `number` images [C, size, size] in [-1, 1], on the CPU.

    The latents of image i depend on the seed and i alone, not on `number` or `batch_size`.

    Args:
        model: in eval mode.
        number: how many images.
        size: their side in pixels, a multiple of f.
        seed: of the latents.
        batch_size: how many are decoded at once.
        precision: fp32, bf16 or fp16; what is not finite is decoded again in fp32.
        tiling: how images that are large for the memory are cut up; they are not unless told.

    Raises:
        ValueError: `size` is not a multiple of f, or an image is not finite.
    """
    check_size(size, model.downsampling_factor)
    for indices in units_of(number, batch_size):
        z = torch.stack([prior_latents(model, size, seed, i) for i in indices])  # [B, z, h, w]
        yield from decode_latents(model, z, precision, tiling)
