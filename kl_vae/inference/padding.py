"""Images of any size made as large as the model takes them.

C channels, H and W the image's height and width, z latent channels, h and w the latents' height and
width, f = H / h once the image is padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_vae.model import AutoEncoderKL


def padded_size(image: Tensor, factor: int) -> tuple[int, int]:
    """Height and width of [C, H, W] raised to multiples of `factor` (f), at least 2 f."""
    # 2 f, since the group norm of a single latent is an error or a constant
    height, width = (max(2, -(-side // factor)) * factor for side in image.shape[1:])
    return height, width


def pad(image: Tensor, factor: int) -> Tensor:
    """Repeat the edge of [C, H, W] to the right and below, up to its `padded_size`."""
    height, width = padded_size(image, factor)
    # repeated, since reflection needs an image larger than what it adds
    border = (0, width - image.shape[2], 0, height - image.shape[1])
    return F.pad(image[None], border, mode="replicate")[0]


def latent_noise(model: AutoEncoderKL, image: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise for a sample of the posterior of [C, H, W], [z, h, w]."""
    factor = model.downsampling_factor
    height, width = padded_size(image, factor)
    shape = (model.latent_channels, height // factor, width // factor)
    return torch.randn(shape, generator=generator, device=generator.device)
