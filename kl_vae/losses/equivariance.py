"""Equivariance regularisation of the latents under rotation and scaling.

Shapes: B batch, C channels, H and W image height and width, z latent channels, h = H/f and w = W/f
latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_vae.blocks import at_least_float32
from kl_vae.runtime.randomness import generator_for


@dataclass(frozen=True)
class Equivariance:
    """Rotation and scaling (EQ-VAE: Kouzelis et al. 2025, arXiv 2502.09509, section 3.2).

    Training decodes the transformed latents and compares the result with the transformed image, so
    that latents rotate and scale as images do. No additional forward pass is needed.

    Attributes:
        quarter_turns: number of rotations by 90 degrees, 0 to 3.
        scale: scale of height and width, in (0, 1].
    """

    quarter_turns: int
    scale: float

    @classmethod
    def draw(cls, probability: float, min_scale: float, *key: int | str) -> Equivariance | None:
        """Draw a random transformation determined by the key, or None for the identity.

        Args:
            probability: probability of a transformation; a quarter of them rotate by 0 degrees.
            min_scale: scales are uniformly distributed between this and 1.
            key: random key, such as seed and step.
        """
        generator = generator_for("equivariance", *key)
        chance, scale = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if chance >= probability:
            return None
        quarter_turns = int(torch.randint(4, (1,), generator=generator))
        return cls(quarter_turns, min_scale + (1.0 - min_scale) * scale)

    def of_latents(self, z: Tensor) -> Tensor:
        """Rotate and scale latents [B, z, h, w]; the result is at least 1 x 1."""
        return self._apply(z, 1)

    def of_images(self, images: Tensor, f: int) -> Tensor:
        """Rotate and scale images [B, C, H, W] to the size of the decoded transformed latents."""
        return self._apply(images, f)

    def _apply(self, x: Tensor, f: int) -> Tensor:
        rotated = torch.rot90(x, self.quarter_turns, (2, 3))
        height, width = (f * max(1, round(side // f * self.scale)) for side in rotated.shape[2:])
        return resize(rotated, (height, width))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, C, H, W] to a size by bilinear interpolation with antialiasing."""
    if size == x.shape[2:]:
        return x
    if x.is_cuda and x.requires_grad:  # the backward of interpolate adds in any order on CUDA
        return resize_by_matrices(x, size)
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def resize_by_matrices(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute `resize` as `rows x columns^T` with matrices [height, H] and [width, W].

    The forward and the backward pass are matrix products, in float32 also under autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        exact = at_least_float32(x)
        rows = _resizing_matrix(exact, x.shape[2], size[0])
        columns = _resizing_matrix(exact, x.shape[3], size[1])
        return (rows @ exact @ columns.mT).to(x.dtype)


def _resizing_matrix(x: Tensor, old: int, new: int) -> Tensor:
    """Return the matrix [new, old] that resizes a side, in the dtype and on the device of x."""
    identity = torch.eye(old, dtype=x.dtype, device=x.device)[None, None]
    # the second axis keeps its size, so that each column of the identity is resized by itself
    return F.interpolate(identity, (new, old), mode="bilinear", antialias=True)[0, 0]
