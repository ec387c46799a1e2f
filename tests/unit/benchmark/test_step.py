"""The published step and ours: the same gradients, with more passes."""

import dataclasses
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae.benchmark.gan_step import build_step, write_random_vgg
from kl_vae.benchmark.published import PublishedStep, gradient_difference, noting_gradients
from kl_vae.benchmark.step import compare_steps
from kl_vae.benchmark.timing import Passes
from kl_vae.data import Batch
from kl_vae.ddconfig import DDConfig
from kl_vae.losses.lpips import LPIPS
from kl_vae.training.step import TrainingStep, latent_noise

CPU = torch.device("cpu")
SIZE = 24  # the smallest that the discriminator takes


class Edges(nn.Module):
    """In LPIPS's place: the squared difference after a fixed convolution, [B, 1, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("kernel", torch.randn(4, 3, 3, 3, generator=generator))

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        difference = nn.functional.conv2d(x - x_hat, self.get_buffer("kernel"))
        return difference.square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def ddconfig(tiny_ddconfig: dict[str, Any]) -> DDConfig:
    return DDConfig.from_dict(tiny_ddconfig)


@pytest.fixture
def ours(ddconfig: DDConfig) -> TrainingStep:
    return build_step(ddconfig, 3, CPU, 2, Edges())


def batch() -> Batch:
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return Batch(2.0 * images - 1.0, torch.arange(2), ("a", "b"), ())


def test_both_steps_give_the_same_gradients(ours: TrainingStep) -> None:
    published = PublishedStep.beside(ours)
    for group in published.optimizer.param_groups:
        group["lr"] = 0.0  # the second forward of the published step comes after the first update
    noise = latent_noise(ours.state.model, batch(), "posterior", 0, 0)
    updater = ours.state.discriminator_updater
    assert updater is not None
    with (
        noting_gradients(ours.state.updater.optimizer) as our_own,
        noting_gradients(updater.optimizer) as our_discriminators,
    ):
        ours(repeat(batch()))
    with (
        noting_gradients(published.optimizer) as published_own,
        noting_gradients(published.discriminator_optimizer) as published_discriminators,
    ):
        published(batch(), noise)
    assert len(our_own) == len(ours.state.model.own_parameters())
    assert gradient_difference(our_own, published_own) < 1e-4
    assert len(our_discriminators) == len(updater.parameters)
    assert gradient_difference(our_discriminators, published_discriminators) < 1e-4


def test_with_the_modules_of_diffusers_it_is_the_same_step(ddconfig: DDConfig) -> None:
    pytest.importorskip("diffusers")
    ours = build_step(ddconfig, 4, CPU, 2, Edges())
    noise = latent_noise(ours.state.model, batch(), "posterior", 0, 0)
    steps = PublishedStep.beside(ours), PublishedStep.with_twin(ours)
    norms = []
    for step in steps:
        with noting_gradients(step.optimizer) as gradients:
            step(batch(), noise)
        norms.append(torch.stack([x.norm() for x in gradients]).norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0.0)


def test_both_steps_move_the_weights_alike(ours: TrainingStep) -> None:
    # of a larger rate and eps, so that rounding shows as rounding
    config = dataclasses.replace(ours.config.optimizer, learning_rate=1e-3, eps=1.0)
    ours.config = dataclasses.replace(ours.config, optimizer=config)
    ours.state.updater.config = config
    for group in ours.state.updater.optimizer.param_groups:
        group |= {"initial_lr": 1e-3, "eps": 1.0}
    published = PublishedStep.beside(ours)
    before = [p.detach().clone() for p in ours.state.model.own_parameters()]
    published(batch(), latent_noise(ours.state.model, batch(), "posterior", 0, 0))
    ours(repeat(batch()))
    both = zip(
        before,
        ours.state.model.own_parameters(),
        published.model.parameters(),
        strict=False,  # those of the loss come last
    )
    for start, mine, theirs in both:
        assert not torch.equal(start, mine)
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=2e-6)


def test_a_comparison_counts_times_and_reports(ddconfig: DDConfig) -> None:
    options: dict[str, Any] = {"size": SIZE, "repeats": 1, "perceptual": Edges()}
    result = compare_steps(ddconfig, None, CPU, precision="bf16", **options)
    assert result.published.passes == {
        "autoencoder": Passes(2, 1),
        "LPIPS": Passes(2, 2),
        "discriminator": Passes(3, 4),
    }
    assert result.ours.passes == {
        "autoencoder": Passes(1, 1),
        "LPIPS": Passes(1, 1),
        "discriminator": Passes(3, 3),
    }
    assert 0.0 < result.ours.timing.low <= result.ours.timing.high
    assert result.ratio == result.published.timing.median / result.ours.timing.median
    assert result.difference < 1e-4


def test_steps_with_other_gradients_are_not_compared(
    ddconfig: DDConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PublishedStep, "_adaptive_weight", lambda *_: torch.tensor(0.0))
    error = r"gradients of both steps differ by \d.*, which is more than rounding \(1e-03\): times"
    with pytest.raises(RuntimeError, match=error):
        compare_steps(ddconfig, 3, CPU, size=SIZE, perceptual=Edges())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"size": 16}, "images of 16 x 16 pixels give no logit; .* crops of 24 pixels or more"),
        ({"size": 25}, "images of 25 x 25: width and height must be multiples of 2"),
        (
            {"perceptual": "vgg", "perceptual_features": "none.pth"},
            "features=none.pth: no such file; give an existing one",
        ),
    ],
)
def test_what_cannot_be_measured_is_named(
    ddconfig: DDConfig, options: dict[str, Any], error: str
) -> None:
    options = {"size": SIZE, "perceptual": Edges(), **options}
    with pytest.raises(ValueError, match=error):
        compare_steps(ddconfig, 3, CPU, **options)


def test_the_difference_is_relative_but_for_what_hardly_counts() -> None:
    a = [torch.tensor([100.0, 0.0]), torch.tensor([1.0]), torch.tensor([1e-9])]
    b = [torch.tensor([100.0, 0.0]), torch.tensor([1.01]), torch.tensor([-1e-9])]
    assert gradient_difference(b, a) == pytest.approx(0.01, rel=1e-3)
    assert gradient_difference(a, a) == 0.0
    nan = gradient_difference([torch.tensor([float("nan")])], [torch.ones(1)])
    assert nan != nan


def test_random_vgg_weights_are_ones_that_lpips_reads(tmp_path: Path) -> None:
    path = write_random_vgg(tmp_path / "vgg16.pth")
    lpips = LPIPS("vgg", linear=False, features=path)
    x = batch().images
    assert 0.0 < lpips(x, -x).mean() < float("inf")
