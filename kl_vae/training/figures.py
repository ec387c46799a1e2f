"""What a run measures: scalars, and vectors with one value a latent channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from kl_vae.distribution import DiagonalGaussianDistribution

Figures = dict[str, "float | list[float]"]

_MEAN, _SQUARE, _STD = "latent_mean", "latent_square", "latent_std"


def latent_moments(posterior: DiagonalGaussianDistribution, split: str) -> dict[str, Tensor]:
    """E[z] and E[z^2] of the latents, [z] each: the channels' first two moments.

    Those of posterior samples, in expectation. Means of them over batches and ranks are exact.
    """
    mean, var = posterior.mean.detach(), posterior.var.detach()
    axes = (0, 2, 3)
    return {
        f"{split}/{_MEAN}": mean.mean(axes),
        f"{split}/{_SQUARE}": (mean.square() + var).mean(axes),
    }


def as_figures(means: Mapping[str, Tensor]) -> Figures:
    """Plain numbers, after all averaging: the second moment becomes the standard deviation."""
    figures: Figures = {}
    for key, value in means.items():
        split, _, name = key.rpartition("/")
        if name == _SQUARE:
            variance = value - means[f"{split}/{_MEAN}"].square()
            figures[f"{split}/{_STD}"] = variance.clamp_min(0.0).sqrt().tolist()
        else:
            figures[key] = value.tolist()
    return figures


def scalar(figures: Figures, key: str) -> float:
    """The figure `key`, which is no vector."""
    value = figures[key]
    assert isinstance(value, float)
    return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
