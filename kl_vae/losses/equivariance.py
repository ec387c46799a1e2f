"""Equivariance regularisation of the latents under rotation and scaling.

Shapes: B batch, C channels, H and W image height and width, z latent channels, h = H/f and w = W/f
latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
        if (height, width) == rotated.shape[2:]:
            return rotated
        return F.interpolate(rotated, (height, width), mode="bilinear", antialias=True)
