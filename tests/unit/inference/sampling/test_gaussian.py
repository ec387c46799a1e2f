"""Gaussians that are fitted to latents."""

from __future__ import annotations

import pytest
import torch
from kl_vae.inference.sampling.gaussian import LatentGaussian, pool, upsample
from kl_vae.inference.sampling.gaussian_fit import (
    COVARIANCES,
    Covariance,
    LatentFeatures,
    Scatter,
    fit,
    grid_side,
)
from torch import Tensor

MIXING = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # channels of correlation 0.8
SCALE = torch.tensor([2.0, 0.5])
SHIFT = torch.tensor([0.5, -3.0])


def latents(number: int, seed: int = 0) -> Tensor:
    """Latents [n, 2, 8, 8] whose halves, above and below, are moved up and down together."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(number, 2, 1, 1, generator=generator).expand(-1, -1, 8, 8).clone()
    large[:, :, 4:] *= -1
    small = torch.randn(number, 2, 8, 8, generator=generator)
    z = torch.einsum("cd,ndhw->nchw", MIXING, 0.8 * large + 0.6 * small)
    return z * SCALE[:, None, None] + SHIFT[:, None, None]


def draws(gaussian: LatentGaussian, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.stack([gaussian.draw(generator, 8, 8) for _ in range(number)])


def covariance_of(z: Tensor) -> Tensor:
    return torch.cov(z.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_what_is_drawn_has_the_statistics_that_were_fitted(covariance: Covariance) -> None:
    z = latents(300)
    drawn = draws(fit(LatentFeatures.of(z, 4), covariance), 600)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.mean((0, 2, 3)), SHIFT, rtol=0.0, atol=0.1)
    expected, found = covariance_of(z), covariance_of(drawn)
    if covariance == "channel":
        expected = expected.diagonal().diag()
    # bilinear upsampling smooths where the halves meet
    tolerance = 0.25 if covariance == "low-resolution" else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.03)
    above, below = drawn[:, 0, :4].mean((1, 2)), drawn[:, 0, 4:].mean((1, 2))
    together = torch.corrcoef(torch.stack([above, below]))[0, 1]
    assert together < -0.8 if covariance == "low-resolution" else abs(together) < 0.1


def test_features_of_parts_are_those_of_the_whole() -> None:
    z = latents(9)
    whole = LatentFeatures.of(z, 4)
    joined = LatentFeatures.join(LatentFeatures.of(part, 4) for part in z.split([2, 3, 4]))
    again = LatentFeatures.from_state(joined.state())
    torch.testing.assert_close(again.state(), whole.state())
    scatter = Scatter.of(z)
    torch.testing.assert_close(
        scatter.covariance, torch.cov(z.double().transpose(0, 1).flatten(1), correction=0)
    )


def test_channels_of_any_scale_are_shrunk_alike() -> None:
    """A single target for all would give the small channel the variance of the large one."""
    z = latents(12) * torch.tensor([1000.0, 1.0])[:, None, None]
    gaussian = fit(LatentFeatures.of(z, 4), "low-resolution")
    assert gaussian.coarse is not None
    assert 0.05 < gaussian.coarse.shrinkage < 1.0
    drawn = draws(gaussian, 300)
    assert drawn[:, 1].std() == pytest.approx(z[:, 1].std().item(), rel=0.3)


def test_latents_that_are_all_alike_are_drawn_as_they_are() -> None:
    z = torch.full((3, 2, 8, 8), 1.5)
    for covariance in COVARIANCES:
        torch.testing.assert_close(draws(fit(LatentFeatures.of(z, 8), covariance), 2), z[:2])


def test_one_image_has_no_covariance() -> None:
    features = LatentFeatures.of(latents(1), 4)
    with pytest.raises(ValueError, match="covariance=low-resolution: 1 image can be used, which"):
        fit(features, "low-resolution")
    assert draws(fit(features, "channels"), 1).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "side"), [((4, 32, 32), 8), ((4, 5, 9), 5), ((128, 8, 8), 5), ((9000, 8, 8), 1)]
)
def test_the_side_of_the_coarse_grid(shape: tuple[int, int, int], side: int) -> None:
    assert grid_side(*shape) == side


def test_pooling_takes_means_and_upsampling_is_between_the_centres() -> None:
    z = torch.tensor([[0.0, 2.0, 4.0, 6.0]]).expand(4, 4)[None, None]
    assert pool(z, 2).tolist() == [[[[1.0, 5.0], [1.0, 5.0]]]]
    assert upsample(pool(z, 2), 4, 4)[0, 0, 0].tolist() == [1.0, 2.0, 4.0, 5.0]
