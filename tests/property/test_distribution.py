"""The posterior agrees with torch.distributions."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from kl_vae import DiagonalGaussianDistribution

means = st.floats(-8.0, 8.0, allow_nan=False, width=32)
logvars = st.floats(-12.0, 8.0, allow_nan=False, width=32)


@st.composite
def posteriors(draw: st.DrawFn) -> DiagonalGaussianDistribution:
    """Over latents [3, 1, 2], of 2 images, in float64."""
    mean = draw(st.lists(means, min_size=12, max_size=12))
    logvar = draw(st.lists(logvars, min_size=12, max_size=12))
    parts = [torch.tensor(x, dtype=torch.float64).reshape(2, 3, 1, 2) for x in (mean, logvar)]
    return DiagonalGaussianDistribution(torch.cat(parts, dim=1))


def reference(posterior: DiagonalGaussianDistribution) -> Independent:
    return Independent(Normal(posterior.mean, (0.5 * posterior.logvar).exp()), 3)


def standard() -> Independent:
    zeros = torch.zeros(2, 3, 1, 2, dtype=torch.float64)
    return Independent(Normal(zeros, zeros + 1.0), 3)


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(posteriors())
def test_kl_to_the_prior_is_that_of_torch_and_never_negative(
    posterior: DiagonalGaussianDistribution,
) -> None:
    agree(posterior.kl(), kl_divergence(reference(posterior), standard()))
    assert (posterior.kl() >= -1e-12).all()  # rounding, near the prior


@given(posteriors(), posteriors())
def test_kl_to_another_is_that_of_torch_and_never_negative(
    posterior: DiagonalGaussianDistribution, other: DiagonalGaussianDistribution
) -> None:
    agree(posterior.kl(other), kl_divergence(reference(posterior), reference(other)))
    assert (posterior.kl(other) >= -1e-9).all()


@given(posteriors())
def test_kl_to_itself_is_zero(posterior: DiagonalGaussianDistribution) -> None:
    agree(posterior.kl(posterior), torch.zeros(2, dtype=torch.float64))


@given(posteriors(), posteriors())
def test_nll_is_minus_the_log_density(
    posterior: DiagonalGaussianDistribution, other: DiagonalGaussianDistribution
) -> None:
    agree(posterior.nll(other.mean), -reference(posterior).log_prob(other.mean))
