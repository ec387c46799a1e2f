"""Running moments: mean and variance of values that arrive in parts.

Shapes: B batch, z latent channels, h and w latent height and width, d features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.latents import LatentNormalization


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and squared deviations of samples in float64, which can be merged.

    Parts are merged by Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for
    computing sample variances", equation 2.1, which never subtracts the square of a large mean.

    Attributes:
        count: number of samples.
        mean: mean, in the shape of a sample.
        squares: sum of squared deviations from `mean`, in the same shape; or, for the covariance of
            samples [d], the sum of outer products of the deviations, [d, d].
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, samples: Tensor, *, covariance: bool = False) -> RunningMoments:
        """Compute the moments of samples [n, ...], or [n, d] with `covariance`; n is at least 1."""
        samples = samples.double()
        mean = samples.mean(0)
        deviations = samples - mean
        squares = deviations.T @ deviations if covariance else deviations.square().sum(0)
        return cls(len(samples), mean, squares)

    @classmethod
    def empty(cls, *shape: int, covariance: bool = False) -> RunningMoments:
        """Return the moments of zero samples of the given shape, to start a running merge."""
        zeros = torch.zeros(shape, dtype=torch.float64)
        return cls(0, zeros, torch.outer(zeros, zeros) if covariance else zeros)

    def merge(self, other: RunningMoments) -> RunningMoments:
        """Return the moments of the union of both sets of samples."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        delta = other.mean - self.mean
        product = delta.square() if self.squares.dim() == delta.dim() else delta.outer(delta)
        squares = self.squares + other.squares + product * self.count * share
        return RunningMoments(count, self.mean + delta * share, squares)

    def values(self) -> dict[str, Any]:
        """Return the moments of samples [d] as plain values for `from_values`."""
        mean, squares = tuple(self.mean.tolist()), tuple(self.squares.tolist())
        return {"values": self.count, "mean": mean, "squares": squares}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RunningMoments:
        """Restore moments from the result of `values`; other keys are ignored."""
        mean, squares = (
            torch.tensor(values[key], dtype=torch.float64) for key in ("mean", "squares")
        )
        return cls(values["values"], mean, squares)

    def variance(self, correction: int = 0) -> Tensor:
        """Return the variance, or the covariance [d, d], with denominator count - `correction`."""
        return self.squares / max(self.count - correction, 1)


def latent_moments(posterior: DiagonalGaussianDistribution) -> RunningMoments:
    """Compute the exact moments per channel, [z], of latents sampled from B posteriors.

    No samples are drawn. By the law of total variance, over images and positions,

        E[z] = E[mean],    Var(z) = Var(mean) + E[std^2].
    """
    both = posterior.mean, posterior.var
    mean, var = (x.cpu().double().movedim(1, 3).flatten(0, 2) for x in both)  # [B * h * w, z]
    mean_moments = RunningMoments.of(mean)
    return RunningMoments(mean_moments.count, mean_moments.mean, mean_moments.squares + var.sum(0))


def latent_normalization(moments: RunningMoments, per_channel: bool = False) -> LatentNormalization:
    """Return the normalisation of latents with these moments to zero mean and unit variance.

    Args:
        moments: moments per channel, [z], see `latent_moments`.
        per_channel: normalise each channel by its own mean and std instead of common ones.
    """
    means, variances = moments.mean.tolist(), moments.variance().tolist()
    # law of total variance over the channels
    shift = math.fsum(means) / len(means)
    total = math.fsum(variances) + math.fsum((mean - shift) ** 2 for mean in means)
    return LatentNormalization(
        scale_factor=1.0 / math.sqrt(total / len(means)),
        shift_factor=shift,
        mean=tuple(means),
        std=tuple(map(math.sqrt, variances)),
        per_channel=per_channel,
    )
