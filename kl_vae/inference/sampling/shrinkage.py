"""A covariance from few samples of many dimensions.

n samples, D dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shrunk(NamedTuple):
    """A covariance [D, D], and how much of it is the target: 0 the samples' own, 1 the target."""

    covariance: Tensor
    shrinkage: float


def ledoit_wolf(x: Tensor) -> Shrunk:
    """(1 - shrinkage) S + shrinkage * mu I, with the shrinkage of the least expected error.

    S is the covariance of the samples (divided by n), mu its mean eigenvalue (Ledoit & Wolf 2004,
    "A well-conditioned estimator for large-dimensional covariance matrices", equation 14). Where n
    is below D, S has no inverse and its large eigenvalues are too large; this has neither fault.

    Args:
        x: samples [n, D], about their own mean, float64.
    """
    n, dimensions = x.shape
    empirical = x.T @ x / n
    mu = empirical.diagonal().mean()
    total = empirical.square().sum()
    # all squared norms of the paper are divided by D, which cancels
    distance = total - dimensions * mu.square()  # ||S - mu I||^2
    # the sum over samples of ||x x^T - S||^2 / n, without a [D, D] matrix for each
    error = (x.square().sum(1).square().mean() - total) / n
    share = (error / distance).clamp(0.0, 1.0).item() if distance > 0 else 1.0
    target = mu * torch.eye(dimensions, dtype=x.dtype)
    return Shrunk((1.0 - share) * empirical + share * target, share)


def symmetric_root(covariance: Tensor) -> Tensor:
    """The symmetric matrix whose square is `covariance`, [D, D]; negative eigenvalues count as 0.

    Unlike a Cholesky factor it exists for singular matrices, and unlike eigenvectors it is unique.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    return root
