"""Merged running moments equal those of all values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce

import pytest
import torch
from torch import Tensor

from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.metrics.moments import RunningMoments, latent_moments, latent_normalization


def parameters(images: int, offset: float = 0.0) -> Tensor:
    """Moments [B, 6, 4, 5] in float64; the channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 0.5, 2.0]).double().view(3, 1, 1)
    mean = torch.randn(images, 3, 4, 5, generator=generator).double() * spread
    mean += torch.tensor([0.3, -2.0, 1.0]).double().view(3, 1, 1) + offset
    logvar = torch.randn(images, 3, 4, 5, generator=generator).double() - 1.0
    return torch.cat([mean, logvar], dim=1)


def moments_of(parameters: Tensor) -> RunningMoments:
    return latent_moments(DiagonalGaussianDistribution(parameters))


def merged(parts: Sequence[RunningMoments]) -> RunningMoments:
    return reduce(RunningMoments.merge, parts, RunningMoments.empty(3))


def brute_force(parameters: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and std of samples over `axes`: E[z] and E[z^2], each of all values at once."""
    mean, logvar = parameters.chunk(2, dim=1)
    first, second = mean.mean(axes), (mean.square() + logvar.exp()).mean(axes)
    return first, (second - first.square()).sqrt()


def assert_close(actual: Tensor, expected: Tensor, rel: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rel, atol=0.0)


def test_merged_parts_are_the_variance_and_covariance_of_torch() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 100.0
    for covariance, expected in ((False, x.double().var(0)), (True, torch.cov(x.double().T))):
        parts = [RunningMoments.of(part, covariance=covariance) for part in x.split(7)]
        empty = RunningMoments.empty(4, covariance=covariance)
        moments = reduce(RunningMoments.merge, parts, empty)
        assert moments.count == 50
        assert_close(moments.mean, x.double().mean(0))
        torch.testing.assert_close(moments.variance(correction=1), expected)


def test_images_have_moments_per_pixel() -> None:
    x = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    moments = RunningMoments.of(x[:2]).merge(RunningMoments.of(x[2:]))
    torch.testing.assert_close(moments.variance(correction=1), x.var(0))


def test_mean_and_std_are_those_of_all_latents() -> None:
    moments = merged([moments_of(part) for part in parameters(7).split(3)])
    assert moments.count == 7 * 4 * 5
    again = RunningMoments.from_values(json.loads(json.dumps(moments.values())))
    assert again.count == moments.count
    assert torch.equal(again.mean, moments.mean) and torch.equal(again.squares, moments.squares)
    mean, std = brute_force(parameters(7), (0, 2, 3))
    assert_close(moments.mean, mean)
    assert_close(moments.variance().sqrt(), std)
    normalization = latent_normalization(moments)
    assert normalization.mean == pytest.approx(mean.tolist(), rel=1e-9)
    assert normalization.std == pytest.approx(std.tolist(), rel=1e-9)
    mean, std = brute_force(parameters(7), (0, 1, 2, 3))
    assert normalization.shift_factor == pytest.approx(mean.item(), rel=1e-9)
    assert normalization.scale_factor == pytest.approx(1.0 / std.item(), rel=1e-9)


@pytest.mark.parametrize("per_channel", [False, True])
def test_normalised_samples_have_mean_0_and_std_1(per_channel: bool) -> None:
    posterior = DiagonalGaussianDistribution(parameters(200))
    samples = posterior.sample(torch.Generator().manual_seed(1))
    z = latent_normalization(latent_moments(posterior), per_channel).normalize(samples)
    std, mean = torch.std_mean(z)
    assert (mean.item(), std.item()) == pytest.approx((0.0, 1.0), abs=0.02)
    std, mean = torch.std_mean(z, (0, 2, 3))
    apart = max(*(mean.abs()), *((std - 1.0).abs())).item()
    assert (apart < 0.05) is per_channel


@pytest.mark.parametrize("ranks", [2, 8])
def test_any_number_of_ranks_gives_the_same(ranks: int) -> None:
    """Also more ranks than batches: some have nothing."""
    batches = parameters(13).split(2)
    one = merged([moments_of(batch) for batch in batches])
    shares = [merged([moments_of(batch) for batch in batches[r::ranks]]) for r in range(ranks)]
    assert (shares[-1].count == 0) is (ranks == 8)
    for moments in (merged(shares), merged(shares[::-1])):
        assert moments.count == one.count
        assert_close(moments.mean, one.mean)
        assert_close(moments.squares, one.squares)


def test_a_mean_far_from_zero_does_not_swallow_the_deviations() -> None:
    near = merged([moments_of(batch) for batch in parameters(300).split(4)])
    batches = parameters(300, offset=1e4).split(4)
    far = merged([moments_of(batch) for batch in batches])
    assert_close(far.squares, near.squares)
    assert_close(far.mean - 1e4, near.mean)
    factors = [latent_normalization(moments).scale_factor for moments in (far, near)]
    assert factors[0] == pytest.approx(factors[1], rel=1e-9)
    # as they come from an encoder, rounded to about 1e-3; naive sums of squares have nothing left
    rounded = merged([moments_of(batch.float()) for batch in batches])
    assert_close(rounded.variance(), near.variance(), rel=2e-3)
    _, naive = brute_force(torch.cat(batches).float(), (0, 2, 3))
    assert naive.tolist() != pytest.approx(near.variance().sqrt().tolist(), rel=0.1)
