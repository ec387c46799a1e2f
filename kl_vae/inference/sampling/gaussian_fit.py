"""Fit a Gaussian to the latents of a data set.

n images, z latent channels, h and w the latents' height and width, g the side of a coarse grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kl_vae.inference.sampling.gaussian import CoarseGaussian, LatentGaussian, pool, upsample
from kl_vae.inference.sampling.shrinkage import ledoit_wolf, symmetric_root

Covariance = Literal["channel", "channels", "low-resolution"]
COVARIANCES: tuple[Covariance, ...] = ("channel", "channels", "low-resolution")

MAX_SIDE = 8  # g
MAX_DIMENSIONS = 4096  # of the coarse grid: eigenvectors of so many take some ten seconds


def grid_side(channels: int, height: int, width: int) -> int:
    """The largest g up to 8 for latents [z, h, w] for which z * g * g is at most 4,096."""
    return max(1, min(MAX_SIDE, height, width, math.isqrt(MAX_DIMENSIONS // channels)))


@dataclass(frozen=True)
class Scatter:
    """Count, mean [z] and the sum of the products of deviations from it [z, z], float64."""

    count: int
    mean: Tensor
    products: Tensor

    @classmethod
    def of(cls, latents: Tensor) -> Scatter:
        """Of all positions of latents [n, z, h, w]."""
        values = latents.double().transpose(0, 1).flatten(1)  # [z, n * h * w]
        mean = values.mean(1)
        values = values - mean[:, None]
        return cls(values.shape[1], mean, values @ values.T)

    def merge(self, other: Scatter) -> Scatter:
        """Of both (Chan, Golub & LeVeque 1979, equation 2.1)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        share = other.count / count
        return Scatter(
            count,
            self.mean + difference * share,
            self.products
            + other.products
            + torch.outer(difference, difference) * (self.count * share),
        )

    @property
    def covariance(self) -> Tensor:
        """Between channels, [z, z], divided by the count."""
        return self.products / self.count


@dataclass(frozen=True)
class LatentFeatures:
    """What a fit needs of some images' latents; of any parts of a data set, it can be joined.

    Attributes:
        pooled: the latents' means on the coarse grid, [n, z, g, g], float64.
        whole: of the latents themselves.
        fine: of what the coarse grid, upsampled, leaves of them.
    """

    pooled: Tensor
    whole: Scatter
    fine: Scatter

    @classmethod
    def of(cls, latents: Tensor, side: int) -> LatentFeatures:
        """Of latents [n, z, h, w] on a grid of g = `side`."""
        latents = latents.double()
        pooled = pool(latents, side)
        fine = latents - upsample(pooled, *latents.shape[2:])
        return cls(pooled, Scatter.of(latents), Scatter.of(fine))

    @classmethod
    def join(cls, parts: Iterable[LatentFeatures]) -> LatentFeatures:
        """Of all parts, of which there is one at least."""
        first, *others = parts
        whole, fine = first.whole, first.fine
        for part in others:
            whole, fine = whole.merge(part.whole), fine.merge(part.fine)
        return cls(torch.cat([part.pooled for part in (first, *others)]), whole, fine)

    def state(self) -> dict[str, Tensor | int]:
        """As tensors and numbers, for a file."""
        return {
            "pooled": self.pooled,
            **{f"whole_{key}": value for key, value in vars(self.whole).items()},
            **{f"fine_{key}": value for key, value in vars(self.fine).items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor | int]) -> LatentFeatures:
        """What `state` gave."""
        parts = [
            Scatter(**{key: state[f"{name}_{key}"] for key in ("count", "mean", "products")})  # type: ignore[arg-type]
            for name in ("whole", "fine")
        ]
        pooled = state["pooled"]
        assert isinstance(pooled, Tensor)
        return cls(pooled, *parts)


def fit(features: LatentFeatures, covariance: Covariance) -> LatentGaussian:
    """The Gaussian of a data set's latents.

    Args:
        features: of the data set.
        covariance: `channel`: each value of its own, with its channel's mean and std; `channels`:
            the channels at a position together, positions of their own; `low-resolution`: the
            coarse grid's channels and positions together, shrunk (`ledoit_wolf`) after each channel
            was scaled to unit variance, and what it leaves of the latents as in `channels`.

    Raises:
        ValueError: `low-resolution` of fewer than 2 images.
    """
    whole = features.whole
    if covariance == "channel":
        return LatentGaussian(whole.mean, whole.covariance.diagonal().sqrt().diag())
    if covariance == "channels":
        return LatentGaussian(whole.mean, symmetric_root(whole.covariance))
    number = len(features.pooled)
    if number < 2:
        raise ValueError(
            f"covariance=low-resolution: {number} image can be used, which has no covariance; "
            "give at least 2, better hundreds, or covariance=channels"
        )
    fine = features.fine
    return LatentGaussian(fine.mean, symmetric_root(fine.covariance), _coarse(features.pooled))


def _coarse(pooled: Tensor) -> CoarseGaussian:
    mean = pooled.mean(0)  # [z, g, g]
    deviations = pooled - mean
    scale = deviations.square().mean((0, 2, 3), keepdim=True).sqrt()  # [1, z, 1, 1]
    x = (deviations / scale.where(scale > 0, torch.ones_like(scale))).flatten(1)
    covariance, shrinkage = ledoit_wolf(x)
    scales = scale.expand(1, *mean.shape).flatten()
    return CoarseGaussian(mean, symmetric_root(covariance * torch.outer(scales, scales)), shrinkage)
