"""Gaussians over latents, from which pictures are drawn.

z latent channels, h and w the latents' height and width, g the side of a coarse grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CoarseGaussian:
    """A Gaussian over latents on a grid of g x g, all channels and positions together.

    Attributes:
        mean: [z, g, g].
        root: the symmetric square root of the covariance, [z * g * g, z * g * g].
        shrinkage: how much of the covariance is not of the data, from 0 to 1; see `ledoit_wolf`.
    """

    mean: Tensor
    root: Tensor
    shrinkage: float

    def draw(self, generator: torch.Generator) -> Tensor:
        """One sample [z, g, g], float64."""
        noise = torch.randn(len(self.root), generator=generator, dtype=torch.float64)
        return self.mean + (self.root @ noise).view_as(self.mean)


@dataclass(frozen=True)
class LatentGaussian:
    """A Gaussian that is the same at each position, about a coarse one where there is one.

    Attributes:
        mean: [z]; of what is not coarse.
        root: the symmetric square root of the covariance between channels at one position, [z, z].
        coarse: what positions have in common; None: nothing.
    """

    mean: Tensor
    root: Tensor
    coarse: CoarseGaussian | None = None

    def draw(self, generator: torch.Generator, height: int, width: int) -> Tensor:
        """One sample [z, h, w], float32; the coarse part is upsampled bilinearly to h x w."""
        drawn = self.mean[:, None, None]
        if self.coarse is not None:
            drawn = drawn + upsample(self.coarse.draw(generator)[None], height, width)[0]
        noise = torch.randn(
            (len(self.mean), height, width), generator=generator, dtype=torch.float64
        )
        return (drawn + torch.einsum("cd,dhw->chw", self.root, noise)).float()


def upsample(coarse: Tensor, height: int, width: int) -> Tensor:
    """[B, z, g, g] -> [B, z, h, w], bilinear between the cells' centres, constant beyond them."""
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def pool(latents: Tensor, side: int) -> Tensor:
    """[B, z, h, w] -> [B, z, g, g], the mean over each of `side` x `side` equal parts.

    Where g does not divide h or w, neighbouring parts share a row or a column.
    """
    return F.adaptive_avg_pool2d(latents, side)
