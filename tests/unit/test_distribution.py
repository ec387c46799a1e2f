"""The posterior: values, precision, and how samples are drawn."""

import math

import pytest
import torch

from kl_vae import AutoEncoderKL, DiagonalGaussianDistribution
from tests.messages import mentions


def moments(mean: float, logvar: float, batch: int = 2) -> torch.Tensor:
    """[batch, 2 * 3, 4, 5] of one mean and one log variance."""
    return torch.cat((torch.full((batch, 3, 4, 5), mean), torch.full((batch, 3, 4, 5), logvar)), 1)


def test_the_moments_are_mean_then_log_variance() -> None:
    posterior = DiagonalGaussianDistribution(moments(1.5, math.log(4.0)))
    assert posterior.mean.shape == posterior.std.shape == (2, 3, 4, 5)
    torch.testing.assert_close(posterior.mean, torch.full((2, 3, 4, 5), 1.5))
    torch.testing.assert_close(posterior.var, torch.full((2, 3, 4, 5), 4.0))
    torch.testing.assert_close(posterior.std, torch.full((2, 3, 4, 5), 2.0))
    assert torch.equal(posterior.mode(), posterior.mean)


def test_kl_and_nll_are_nats_an_image() -> None:
    posterior = DiagonalGaussianDistribution(moments(1.5, math.log(4.0)))
    kl = 60 * 0.5 * (1.5**2 + 4.0 - 1.0 - math.log(4.0))
    torch.testing.assert_close(posterior.kl(), torch.full((2,), kl))
    nll = 60 * 0.5 * (math.log(2.0 * math.pi * 4.0) + (2.5 - 1.5) ** 2 / 4.0)
    torch.testing.assert_close(posterior.nll(torch.full((2, 3, 4, 5), 2.5)), torch.full((2,), nll))


def test_kl_is_each_images_own() -> None:
    both = torch.cat((moments(0.0, 0.0, batch=1), moments(2.0, 1.0, batch=1)))
    alone = DiagonalGaussianDistribution(both[1:]).kl()
    kl = DiagonalGaussianDistribution(both).kl()
    torch.testing.assert_close(kl, torch.cat((torch.zeros(1), alone)))


@pytest.mark.parametrize(("given", "clamped"), [(-1e4, -30.0), (1e4, 20.0), (float("inf"), 20.0)])
def test_log_variance_is_clamped(given: float, clamped: float) -> None:
    posterior = DiagonalGaussianDistribution(moments(0.0, given))
    assert torch.equal(posterior.logvar, torch.full((2, 3, 4, 5), clamped))
    assert posterior.kl().isfinite().all()
    assert posterior.nll(posterior.sample()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_to_float32(dtype: torch.dtype) -> None:
    low = moments(300.0, 1.0).to(dtype)  # its square is no float16
    posterior = DiagonalGaussianDistribution(low)
    expected = DiagonalGaussianDistribution(low.float())
    assert posterior.sample().dtype == torch.float32
    torch.testing.assert_close(posterior.kl(), expected.kl())
    assert DiagonalGaussianDistribution(low.double()).kl().dtype == torch.float64


def test_autocast_does_not_lower_the_posterior(
    tiny_model: AutoEncoderKL, images: torch.Tensor
) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        posterior = tiny_model.encode(images)
        z = posterior.sample()
        values = (posterior.std, posterior.var, z, posterior.kl(), posterior.nll(z))
        assert tiny_model.decode(z).dtype == torch.bfloat16  # autocast was at work
    assert {value.dtype for value in values} == {torch.float32}
    torch.testing.assert_close(values[3], DiagonalGaussianDistribution(posterior.parameters).kl())


def test_a_deterministic_posterior_is_a_point() -> None:
    posterior = DiagonalGaussianDistribution(moments(1.5, 2.0), deterministic=True)
    assert torch.equal(posterior.sample(), posterior.mean)
    zeros = torch.zeros(2, 3, 4, 5)
    assert torch.equal(posterior.std, zeros)
    assert torch.equal(posterior.var, zeros)
    assert torch.equal(posterior.kl(), torch.zeros(2))
    assert torch.equal(posterior.kl(DiagonalGaussianDistribution(moments(0, 0))), torch.zeros(2))
    assert torch.equal(posterior.nll(zeros), torch.zeros(2))


def test_a_sample_is_mean_plus_std_times_noise() -> None:
    posterior = DiagonalGaussianDistribution(moments(1.5, math.log(4.0)))
    noise = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(posterior.sample(noise=noise), 1.5 + 2.0 * noise)
    drawn = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(7))
    given = posterior.sample(torch.Generator().manual_seed(7))
    assert torch.equal(given, posterior.sample(noise=drawn))


def test_samples_without_a_generator_follow_torchs() -> None:
    posterior = DiagonalGaussianDistribution(moments(0.0, 0.0))
    torch.manual_seed(3)
    first, second = posterior.sample(), posterior.sample()
    torch.manual_seed(3)
    assert torch.equal(posterior.sample(), first)
    assert not torch.equal(first, second)


def test_a_sample_carries_gradients_to_both_moments() -> None:
    parameters = moments(0.5, -1.0).requires_grad_()
    noise = torch.randn(2, 3, 4, 5)
    DiagonalGaussianDistribution(parameters).sample(noise=noise).sum().backward()
    assert parameters.grad is not None
    to_mean, to_logvar = parameters.grad.chunk(2, dim=1)
    torch.testing.assert_close(to_mean, torch.ones(2, 3, 4, 5))
    torch.testing.assert_close(to_logvar, 0.5 * math.exp(-0.5) * noise)


def test_its_text_tells_shape_device_and_values() -> None:
    text = repr(DiagonalGaussianDistribution(torch.zeros(2, 8, 3, 3)))
    assert "shape=[2, 4, 3, 3]" in text and "device='cpu'" in text and "std 1 " in text
    assert "std" not in repr(DiagonalGaussianDistribution(torch.zeros(2, 8, 3, 3, device="meta")))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_one_generator_per_image_gives_each_image_its_own_sample() -> None:
    both = torch.cat((moments(0.0, 0.0, batch=1), moments(2.0, 1.0, batch=1)))
    together = DiagonalGaussianDistribution(both).sample(generator=generators(3, 4))
    for i, generator in enumerate(generators(3, 4)):
        alone = DiagonalGaussianDistribution(both[i : i + 1]).sample(generator)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_wrong_number_of_generators_is_an_error(number: int) -> None:
    posterior = DiagonalGaussianDistribution(moments(0.0, 0.0))
    with pytest.raises(ValueError, match=mentions("generator", number, 2)):
        posterior.sample(generator=generators(*range(number)))
