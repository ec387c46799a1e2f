"""Rotations and scales that image and latents should undergo alike.

B batch, C channels, H and W the image's height and width, z channels of the latents, h = H/f and
w = W/f their height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_vae.runtime.randomness import generator_for


@dataclass(frozen=True)
class Equivariance:
    """Quarter turns and a scale (EQ-VAE: Kouzelis et al. 2025, arXiv 2502.09509, section 3.2).

    Training decodes the transformed latents and compares with the image transformed in the same
    way, so that latents rotate and shrink as images do. It needs no further pass.

    Attributes:
        quarter_turns: rotation by 90 degrees each, 0 to 3.
        scale: of height and width, above 0, at most 1.
    """

    quarter_turns: int
    scale: float

    @classmethod
    def draw(cls, probability: float, min_scale: float, *key: int | str) -> Equivariance | None:
        """Draw the transformation of a step, a function of the key; None: the identity.

        Args:
            probability: of a transformation; its rotation is by 0 degrees in a quarter of cases.
            min_scale: scales are uniform between this and 1.
            key: such as seed and step.
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
        turned = torch.rot90(x, self.quarter_turns, (2, 3))
        height, width = (f * max(1, round(side // f * self.scale)) for side in turned.shape[2:])
        if (height, width) == turned.shape[2:]:
            return turned
        return F.interpolate(turned, (height, width), mode="bilinear", antialias=True)
