"""Scalars and vectors that a run measures."""

import torch
from kl_vae.training.figures import as_figures, evaluating, latent_moments, scalar
from torch import nn

from kl_vae import DiagonalGaussianDistribution


def test_mean_and_std_of_each_channel_are_those_of_samples() -> None:
    torch.manual_seed(0)
    moments = (
        torch.randn(4, 6, 32, 32) * torch.tensor([1.0, 2.0, 3.0, 0.5, 0.5, 0.5])[:, None, None]
    )
    moments[:, :3] += torch.tensor([0.0, 1.0, -2.0])[:, None, None]
    posterior = DiagonalGaussianDistribution(moments)
    figures = as_figures(latent_moments(posterior, "val"))
    assert figures.keys() == {"val/latent_mean", "val/latent_std"}
    samples = torch.cat([posterior.sample() for _ in range(50)])
    mean, std = samples.mean((0, 2, 3)), samples.std((0, 2, 3))
    assert torch.allclose(torch.tensor(figures["val/latent_mean"]), mean, atol=0.02)
    assert torch.allclose(torch.tensor(figures["val/latent_std"]), std, rtol=0.02)


def test_parts_of_a_batch_average_to_the_whole() -> None:
    moments = torch.randn(4, 6, 8, 8)
    whole = latent_moments(DiagonalGaussianDistribution(moments), "val")
    parts = [latent_moments(DiagonalGaussianDistribution(part), "val") for part in moments.split(2)]
    for key, value in whole.items():
        assert torch.allclose((parts[0][key] + parts[1][key]) / 2, value, atol=1e-5)


def test_scalars_stay_scalars_and_nan_stays_nan() -> None:
    figures = as_figures({"train/psnr": torch.tensor(3.0), "train/loss": torch.tensor(torch.nan)})
    assert scalar(figures, "train/psnr") == 3.0
    assert str(figures["train/loss"]) == "nan"


def test_evaluating_puts_the_mode_back() -> None:
    module = nn.Dropout()
    for mode in (True, False):
        module.train(mode)
        with evaluating(module):
            assert not module.training
        assert module.training == mode
