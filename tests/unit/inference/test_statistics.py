"""The statistics of latents are those of all their values, in whatever parts they are summed."""

import math
from collections.abc import Sequence
from functools import reduce

import pytest
import torch
from kl_vae.inference.statistics import LatentSums, latent_sums
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.data import Batch
from kl_vae.distribution import DiagonalGaussianDistribution


def moments_of(images: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    """Moments [B, 6, 4, 5] in float64; the channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0, 0.5, 2.0]).double().view(3, 1, 1)
    mean = torch.randn(images, 3, 4, 5, generator=generator).double() * spread
    mean += torch.tensor([0.3, -2.0, 1.0]).double().view(3, 1, 1) + offset
    logvar = torch.randn(images, 3, 4, 5, generator=generator).double() - 1.0
    return torch.cat([mean, logvar], dim=1)


def sums_of(moments: Tensor) -> LatentSums:
    return LatentSums.of(DiagonalGaussianDistribution(moments))


def merged(parts: Sequence[LatentSums]) -> LatentSums:
    return reduce(LatentSums.merge, parts, LatentSums.of_nothing(3))


def brute_force(moments: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and std of samples over `axes`: E[z] and E[z^2], each of all values at once."""
    mean, logvar = moments.chunk(2, dim=1)
    first, second = mean.mean(axes), (mean.square() + logvar.exp()).mean(axes)
    return first, (second - first.square()).sqrt()


def assert_close(sums: LatentSums, expected: LatentSums, rel: float = 1e-9) -> None:
    assert (sums.images, sums.values) == (expected.images, expected.values)
    assert sums.mean == pytest.approx(expected.mean, rel=rel)
    assert sums.squares == pytest.approx(expected.squares, rel=rel)


def test_mean_and_std_are_those_of_all_values() -> None:
    moments = moments_of(7)
    sums = merged([sums_of(part) for part in moments.split(3)])
    assert (sums.images, sums.values) == (7, 7 * 4 * 5)
    mean, std = brute_force(moments, (0, 2, 3))
    assert sums.mean == pytest.approx(mean.tolist(), rel=1e-9)
    assert sums.std == pytest.approx(std.tolist(), rel=1e-9)
    mean, std = brute_force(moments, (0, 1, 2, 3))
    normalization = sums.normalization()
    assert normalization.shift_factor == pytest.approx(mean.item(), rel=1e-9)
    assert normalization.scale_factor == pytest.approx(1.0 / std.item(), rel=1e-9)
    assert (normalization.mean, normalization.std) == (sums.mean, sums.std)


def test_they_are_those_of_samples_of_the_posteriors() -> None:
    posterior = DiagonalGaussianDistribution(moments_of(5))
    generator = torch.Generator().manual_seed(1)
    samples = torch.stack([posterior.sample(generator) for _ in range(4000)])  # [4000, B, z, h, w]
    sums = LatentSums.of(posterior)
    # of 400,000 values a channel: some standard errors are 1%
    assert sums.mean == pytest.approx(samples.mean((0, 1, 3, 4)).tolist(), abs=0.01)
    assert sums.std == pytest.approx(samples.std((0, 1, 3, 4)).tolist(), rel=0.01)
    normalization = sums.normalization()
    assert normalization.shift_factor == pytest.approx(samples.mean().item(), abs=0.01)
    assert 1.0 / normalization.scale_factor == pytest.approx(samples.std().item(), rel=0.01)


@pytest.mark.parametrize("per_channel", [False, True])
def test_normalised_samples_have_mean_0_and_std_1(per_channel: bool) -> None:
    posterior = DiagonalGaussianDistribution(moments_of(200))
    samples = posterior.sample(torch.Generator().manual_seed(1))
    z = LatentSums.of(posterior).normalization(per_channel).normalize(samples)
    std, mean = torch.std_mean(z)
    assert (mean.item(), std.item()) == pytest.approx((0.0, 1.0), abs=0.02)
    std, mean = torch.std_mean(z, (0, 2, 3))
    apart = max(*(mean.abs()), *((std - 1.0).abs())).item()
    assert (apart < 0.05) is per_channel


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_any_number_of_ranks_gives_the_same(ranks: int) -> None:
    """Also more ranks than batches: some have nothing."""
    batches = moments_of(13).split(2)
    one = merged([sums_of(batch) for batch in batches])
    shares = [merged([sums_of(batch) for batch in batches[r::ranks]]) for r in range(ranks)]
    assert (shares[-1].images == 0) is (ranks == 8)
    assert_close(merged(shares), one)
    assert_close(merged(shares[::-1]), one)


def test_a_mean_far_from_zero_does_not_swallow_the_deviations() -> None:
    batches = moments_of(300, offset=1e4).split(4)
    near = merged([sums_of(batch) for batch in moments_of(300).split(4)])
    far = merged([sums_of(batch) for batch in batches])
    assert far.squares == pytest.approx(near.squares, rel=1e-9)
    assert [m - 1e4 for m in far.mean] == pytest.approx(near.mean, rel=1e-9)
    of_all, of_all_near = far.normalization(), near.normalization()
    assert of_all.scale_factor == pytest.approx(of_all_near.scale_factor, rel=1e-9)
    # as they come from an encoder, rounded to about 1e-3; naive sums of squares have nothing left
    rounded = [batch.float() for batch in batches]
    assert merged([sums_of(batch) for batch in rounded]).std == pytest.approx(near.std, rel=1e-3)
    _, naive = brute_force(torch.cat(rounded), (0, 2, 3))
    assert naive.tolist() != pytest.approx(near.std, rel=0.1)


def batch_of(images: Tensor) -> Batch:
    names = tuple(f"{i:03d}.png" for i in range(len(images)))
    return Batch(images, torch.arange(len(images)), names, ())


@pytest.fixture
def images() -> Tensor:
    return 2.0 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 1.0


def test_a_batch_is_encoded_and_summed_up(model: AutoEncoderKL, images: Tensor) -> None:
    sums = latent_sums(model, batch_of(images))
    assert (sums.images, sums.values) == (4, 4 * 4 * 4)
    with torch.no_grad():
        mean, std = brute_force(model.encode(images).parameters.double(), (0, 2, 3))
    assert sums.mean == pytest.approx(mean.tolist(), rel=1e-6)
    assert sums.std == pytest.approx(std.tolist(), rel=1e-6)
    halves = [latent_sums(model, batch_of(half)) for half in images.split(2)]
    assert_close(halves[0].merge(halves[1]), sums, rel=1e-5)
    in_half = latent_sums(model, batch_of(images), "bf16")
    assert in_half.std == pytest.approx(sums.std, rel=0.05)
    assert in_half != sums


def test_moments_that_are_not_finite_are_an_error(model: AutoEncoderKL, images: Tensor) -> None:
    images[1, 0, 3, 3] = math.nan
    message = "^001.png: the posterior in fp32 has NaN or infinity: the checkpoint's weights"
    with pytest.raises(ValueError, match=message):
        latent_sums(model, batch_of(images))
    images[3] = math.inf
    message = "^001.png and 1 more of its batch: the posterior in fp32 has NaN or infinity"
    with pytest.raises(ValueError, match=message):
        latent_sums(model, batch_of(images), "bf16")


def test_a_batch_too_large_for_the_gpu_is_an_error(model: AutoEncoderKL, images: Tensor) -> None:
    def encode(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.encode = encode  # type: ignore[method-assign, assignment]
    message = "^a batch of 4 images of 16 x 16 does not fit into the memory of cpu; lower the batch"
    with pytest.raises(ValueError, match=message):
        latent_sums(model, batch_of(images))
