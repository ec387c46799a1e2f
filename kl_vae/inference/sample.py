"""Decode latents drawn from the prior N(0, I).

What these pictures mean: the decoder is shown raw latents of the prior, as nothing but the KL term
ties the posteriors to it. An autoencoder with the small kl_weight of latent diffusion is no
generator: texture without things is what it gives, and that the pictures are neither grey nor
saturated is what to look for. Latents with structure come from a diffusion model trained on top.

z latent channels, h = w = size / f.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kl_vae.device import autocast
from kl_vae.model import AutoEncoderKL
from kl_vae.randomness import generator_for


def check_size(size: int, factor: int) -> None:
    """Check the side of the images to sample.

    Raises:
        ValueError: `factor` (f) does not divide it.
    """
    if size < 1 or size % factor:
        nearest = max(1, round(size / factor)) * factor
        raise ValueError(f"size={size}: must be a multiple of {factor}; give {nearest}")


@torch.inference_mode()
def sample_prior(
    model: AutoEncoderKL,
    number: int,
    size: int,
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "fp32",
) -> Iterator[Tensor]:
    """Yield `number` images [C, size, size] in [-1, 1], on the CPU.

    The latents of image i depend on the seed and i alone, not on `number` or `batch_size`.

    Args:
        model: in eval mode.
        number: how many images.
        size: their side in pixels, a multiple of f.
        seed: of the latents.
        batch_size: how many are decoded at once.
        precision: fp32, bf16 or fp16.

    Raises:
        ValueError: `size` is not a multiple of f, or an image is not finite.
    """
    check_size(size, model.downsampling_factor)
    device = next(model.parameters()).device
    side = size // model.downsampling_factor
    for start in range(0, number, batch_size):
        z = torch.stack(
            [
                torch.randn(
                    (model.latent_channels, side, side), generator=generator_for("sample", seed, i)
                )
                for i in range(start, min(start + batch_size, number))
            ]
        )  # [B, z, h, w]
        with autocast(device, precision):
            images = model.decode(z.to(device))
        images = images.float().cpu()
        if not images.isfinite().all():
            raise ValueError(
                f"a decoded sample in {precision} has NaN or infinity; try another precision"
            )
        yield from images.clamp(-1.0, 1.0)
