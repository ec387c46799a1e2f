"""One optimisation step: what it counts, what it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.data import Batch
from kl_vae.training.config import RunConfig
from kl_vae.training.distributed import Ranks
from kl_vae.training.prepare import build_state, wrap
from kl_vae.training.step import TrainingStep, latent_noise
from kl_vae.training.updater import MAX_SKIPPED_STEPS

Loss = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def batches(value: float = 0.5) -> Iterator[Batch]:
    while True:
        yield Batch(torch.full((8, 3, 16, 16), value), torch.arange(8), ("",) * 8)


def build(loss: Loss | None = None, *overrides: str) -> TrainingStep:
    config = RunConfig.load("tiny.yaml", overrides)
    params = config.model.params
    torch.manual_seed(0)
    model = AutoEncoderKL(params.ddconfig, params.embed_dim, loss or params.lossconfig)
    state = build_state(config, model, {}, "")
    ranks = Ranks(0, 1, torch.device("cpu"))
    return TrainingStep(state, *wrap(model, ranks), config, ranks, 100)


def weights(step: TrainingStep) -> list[torch.Tensor]:
    return [p.detach().clone() for p in step.state.model.parameters()]


def broken_loss(value: float) -> Loss:
    def loss(inputs, reconstructions, posterior, global_step, last_layer, split):  # type: ignore[no-untyped-def]
        total = reconstructions.mean() * value
        return total, {f"{split}/total_loss": total.detach()}

    return loss


def test_a_step_learns_and_counts(project: Path) -> None:
    take_step = build()
    before = weights(take_step)
    figures = take_step(batches())
    assert take_step.state.step == 1 and take_step.state.images_seen == 8
    assert {"train/total_loss", "train/psnr", "train/grad_norm"} <= figures.keys()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(take_step), strict=True))


def test_psnr_is_the_mean_over_images_in_db(project: Path) -> None:
    take_step = build()
    torch.manual_seed(0)
    images = next(batches()).images
    noise = latent_noise(take_step.state.model, next(batches()), "posterior", 0, 0)
    with torch.no_grad():
        reconstruction, _ = take_step.state.model(images, noise=noise)
    mse = (images - reconstruction).square().mean((1, 2, 3))
    expected = (10 * (4 / mse).log10()).mean()
    assert torch.allclose(take_step(batches())["train/psnr"], expected, atol=1e-4)


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(project: Path) -> None:
    take_step = build(broken_loss(float("nan")))
    before = weights(take_step)
    for _ in range(MAX_SKIPPED_STEPS - 1):
        figures = take_step(batches())
    assert torch.isnan(figures["train/total_loss"])  # not hidden
    assert take_step.state.updater.skipped == MAX_SKIPPED_STEPS - 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(take_step), strict=True))
    with pytest.raises(RuntimeError, match="10 steps in a row had no finite gradient; lower opt"):
        take_step(batches())


def test_an_overflow_in_fp16_lowers_the_scale_and_training_goes_on(project: Path) -> None:
    take_step = build(broken_loss(1e30), "training.precision=fp16")
    scale = take_step.state.updater.scaler.get_scale()
    before = weights(take_step)
    take_step(batches())
    assert take_step.state.updater.skipped == 1
    assert take_step.state.updater.scaler.get_scale() < scale
    assert all(torch.equal(a, b) for a, b in zip(before, weights(take_step), strict=True))


def test_gradients_are_clipped_to_the_bound(project: Path) -> None:
    take_step = build(None, "optimizer.clip_grad_norm=0.001", "optimizer.name=adam")
    seen = {}

    def note(optimizer, args, kwargs):  # type: ignore[no-untyped-def]
        grads = [p.grad for p in take_step.state.model.parameters() if p.grad is not None]
        seen["norm"] = torch.stack([g.norm() for g in grads]).norm().item()

    take_step.state.updater.optimizer.register_step_pre_hook(note)
    before_clipping = take_step(batches())["train/grad_norm"]
    assert before_clipping > 0.001
    assert seen["norm"] == pytest.approx(0.001, rel=1e-3)


def test_the_noise_of_a_sample_depends_on_its_position_alone(project: Path) -> None:
    model = build().state.model
    batch = next(batches())
    whole = latent_noise(model, batch, "posterior", 0, 3)
    part = Batch(batch.images[:2], torch.tensor([5, 1]), ("", ""))
    assert torch.equal(latent_noise(model, part, "posterior", 0, 3), whole[[5, 1]])
    assert not torch.equal(latent_noise(model, batch, "posterior", 0, 4), whole)
    assert whole.shape == (8, 4, 8, 8)
    assert abs(whole.mean()) < 0.1 and abs(whole.std() - 1) < 0.1


def test_an_unreadable_image_is_named_with_the_mend(project: Path) -> None:
    bad = Batch(torch.zeros(2, 3, 16, 16), torch.arange(2), ("", "images/a.png: truncated"))
    with pytest.raises(ValueError, match=r"images/a.png: truncated; mend it, or name it in data"):
        build()(iter([bad]))
