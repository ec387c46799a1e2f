"""One optimization step: counters and skipped steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kl_vae import AutoEncoderKL, DiagonalGaussianDistribution
from kl_vae.data import BadImage, Batch, to_float
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError
from kl_vae.training.config import RunConfig
from kl_vae.training.guards import BadImages, Skips, StopRequest
from kl_vae.training.setup import build_model, build_state
from kl_vae.training.step import TrainingStep, latent_moments, posterior_noise, to_device
from tests.messages import is_about, mentions

Loss = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def batches(value: float = 0.5) -> Iterator[Batch]:
    while True:
        names = tuple(f"images/{i}.png" for i in range(8))
        yield Batch(torch.full((8, 3, 16, 16), value), torch.arange(8), names, ())


def build(loss: Loss | None = None, *overrides: str) -> TrainingStep:
    config = RunConfig.load("tiny.yaml", overrides)
    params = config.model.params
    torch.manual_seed(0)
    model = AutoEncoderKL(params.ddconfig, params.embed_dim, loss or params.lossconfig)
    state = build_state(config, model, {}, "")
    ranks = Ranks(0, 1, torch.device("cpu"))
    bad_images = BadImages(None, ranks, 1000, 0.01)
    return TrainingStep(state, config, ranks, 100, bad_images)


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
    metrics, _ = take_step(batches())
    assert take_step.state.step == 1 and take_step.state.images_seen == 8
    assert {"train/total_loss", "train/psnr", "train/grad_norm"} <= metrics.keys()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(take_step), strict=True))


def test_a_step_returns_the_stop_request(project: Path) -> None:
    stop, take_step = StopRequest(), build()
    assert not take_step(batches()).stop and not take_step(batches(), stop).stop
    stop.signal = "SIGTERM"
    assert take_step(batches(), stop).stop and take_step.state.step == 3


def test_psnr_is_the_mean_over_images_in_db(project: Path) -> None:
    take_step = build()
    torch.manual_seed(0)
    images = next(batches()).images
    noise = posterior_noise(take_step.state.model, next(batches()), "posterior", 0, 0)
    with torch.no_grad():
        reconstruction, _ = take_step.state.model(images, noise=noise)
    mse = (images - reconstruction).square().mean((1, 2, 3))
    expected = (10 * (4 / mse).log10()).mean()
    assert torch.allclose(take_step(batches()).metrics["train/psnr"], expected, atol=1e-4)


def test_a_step_with_a_nan_loss_is_skipped_and_its_images_are_logged(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    take_step = build(broken_loss(float("nan")), "training.max_skipped_steps=3")
    before = weights(take_step)
    for _ in range(2):
        metrics, _ = take_step(batches())
    assert torch.isnan(metrics["train/total_loss"])  # not hidden
    assert take_step.state.skips == Skips(total=2, in_a_row=2)
    assert take_step.state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, weights(take_step), strict=True))
    *_, skipped, names = caplog.messages
    assert is_about(skipped, "step 2", "loss", "rank 0", 2)
    assert is_about(names, "rank 0", ", ".join(f"images/{i}.png" for i in range(8)))
    with pytest.raises(RunError, match=mentions(3, "training.max_skipped_steps")):
        take_step(batches())


def test_only_images_of_the_batch_with_the_nan_loss_are_logged(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def loss(inputs, reconstructions, posterior, global_step, last_layer, split):  # type: ignore[no-untyped-def]
        total = (reconstructions - inputs / (inputs - 7.0)).square().mean()
        return total, {f"{split}/total_loss": total.detach()}

    take_step = build(loss, "training.accumulate_batches=2")
    fine, broken = (
        Batch(torch.full((4, 3, 16, 16), value), torch.arange(4), (f"{name}.png",) * 4, ())
        for value, name in ((0.5, "fine"), (7.0, "broken"))
    )
    take_step(iter([fine, broken]))
    assert "broken.png" in caplog.text and "fine.png" not in caplog.text


def test_a_step_with_a_nan_gradient_is_skipped(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def loss(inputs, reconstructions, posterior, global_step, last_layer, split):  # type: ignore[no-untyped-def]
        total = (
            (reconstructions - reconstructions.detach()).sum().abs().sqrt()
        )  # slope of sqrt at 0
        return total, {f"{split}/total_loss": total.detach()}

    take_step = build(loss)
    before = weights(take_step)
    metrics, _ = take_step(batches())
    assert metrics["train/total_loss"] == 0.0 and not metrics["train/grad_norm"].isfinite()
    assert is_about(caplog.messages[0], "step 1", "gradient")
    assert not is_about(caplog.messages[0], "loss")
    assert all(torch.equal(a, b) for a, b in zip(before, weights(take_step), strict=True))


def test_an_overflow_in_fp16_lowers_the_scale_and_is_counted_apart(project: Path) -> None:
    take_step = build(broken_loss(1e30), "training.precision=fp16", "training.max_skipped_steps=2")
    scaler = take_step.state.autoencoder.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 8.0})
    before = weights(take_step)
    one = Batch(torch.zeros(1, 3, 16, 16), torch.arange(1), ("a.png",), ())
    for step in range(4):  # more than training.max_skipped_steps
        assert scaler.get_scale() == 2.0 ** (3 - step)
        assert take_step.state.skips.by_scaler == step
        assert take_step.state.skips.total == 0
        take_step(iter([one]))
    # at a scale of 1 the scaler is not the cause
    assert take_step.state.skips == Skips(total=1, in_a_row=1, by_scaler=3)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(take_step), strict=True))


def test_bad_images_of_a_batch_are_noted(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    take_step = build()
    batch = next(batches())._replace(bad=(BadImage("images/x.png", "truncated"),))
    take_step(iter([batch]))
    assert is_about(caplog.text, "images/x.png", "truncated")
    assert not take_step.bad_images.too_many


def test_a_bad_image_without_replacement_is_an_error(project: Path) -> None:
    blank = Batch(torch.zeros(2, 3, 16, 16), torch.arange(2), ("a.png", ""), ())
    with pytest.raises(RunError, match=mentions("image", "data.train.root")):
        build()(iter([blank]))
    blank = blank._replace(bad=(BadImage("b.tif", "values from -1024 to 1776"),))
    parts = ("b.tif: values from -1024 to 1776", "data.train.root")
    with pytest.raises(RunError, match=mentions(*parts)):
        build()(iter([blank]))


def test_gradients_are_clipped_to_the_bound(project: Path) -> None:
    take_step = build(None, "optimizer.clip_grad_norm=0.001", "optimizer.name=adam")
    seen = {}

    def note(optimizer, args, kwargs):  # type: ignore[no-untyped-def]
        grads = [p.grad for p in take_step.state.model.parameters() if p.grad is not None]
        seen["norm"] = torch.stack([g.norm() for g in grads]).norm().item()

    take_step.state.autoencoder.optimizer.register_step_pre_hook(note)
    before_clipping = take_step(batches()).metrics["train/grad_norm"]
    assert before_clipping > 0.001
    assert seen["norm"] == pytest.approx(0.001, rel=1e-3)


def test_the_noise_of_a_sample_depends_only_on_its_position(project: Path) -> None:
    model = build().state.model
    batch = next(batches())
    whole = posterior_noise(model, batch, "posterior", 0, 3)
    part = Batch(batch.images[:2], torch.tensor([5, 1]), ("", ""), ())
    assert torch.equal(posterior_noise(model, part, "posterior", 0, 3), whole[[5, 1]])
    assert not torch.equal(posterior_noise(model, batch, "posterior", 0, 4), whole)
    assert whole.shape == (8, 4, 8, 8)
    assert abs(whole.mean()) < 0.1 and abs(whole.std() - 1) < 0.1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_uint8_images_are_converted_as_when_read_from_a_file(
    device: str, channels_last: bool
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    every = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    moved = to_device(every, torch.device(device), channels_last)
    assert moved.dtype == torch.float32 and moved.is_contiguous(memory_format=layout)
    assert torch.equal(moved.cpu(), to_float(every))
    same = to_device(to_float(every), torch.device(device), channels_last)
    assert torch.equal(same, moved) and same.is_contiguous(memory_format=layout)


def test_a_step_on_uint8_images_equals_one_on_floats(project: Path) -> None:
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    results = []
    for given in (images, to_float(images)):
        take_step = build()
        metrics, _ = take_step(iter([next(batches())._replace(images=given)]))
        results.append([*metrics.values(), *weights(take_step)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", ["none", "norms", "blocks"])
def test_a_step_synchronizes_with_the_gpu_once(project: Path, checkpointing: str) -> None:
    config = RunConfig.load(
        "tiny.yaml",
        [
            *("training.precision=bf16", "training.ema_decay=0.9", "training.equivariance=0.5"),
            f"training.activation_checkpointing={checkpointing}",
            "model.params.lossconfig={target: lpips_with_discriminator, params: {disc_start: 0, "
            "perceptual_weight: 0.0, disc_num_layers: 1, lecam_weight: 0.1}}",
        ],
    )
    ranks = Ranks(0, 1, torch.device("cuda"))
    model = build_model(config, ranks, resuming=False)
    state = build_state(config, model, {}, "")
    bad_images = BadImages(None, ranks, 1000, 0.01)
    take_step = TrainingStep(state, config, ranks, 100, bad_images)
    pinned = (batch._replace(images=batch.images.pin_memory()) for batch in batches())
    for _ in range(3):  # the first steps may synchronize
        take_step(pinned)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as waits:
            take_step(pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [Path(wait.filename).name for wait in waits] == ["guards.py"]


def test_latent_moments_match_samples_and_average_over_batches() -> None:
    torch.manual_seed(0)
    parameters = torch.randn(4, 6, 32, 32) * torch.tensor([1, 2, 3, 0.5, 0.5, 0.5])[:, None, None]
    parameters[:, :3] += torch.tensor([0.0, 1.0, -2.0])[:, None, None]
    posterior = DiagonalGaussianDistribution(parameters)
    whole = latent_moments(posterior, "val")
    assert whole.keys() == {"val/latent_mean", "val/latent_square"}
    samples = torch.cat([posterior.sample() for _ in range(50)])
    assert torch.allclose(whole["val/latent_mean"], samples.mean((0, 2, 3)), atol=0.02)
    square = samples.square().mean((0, 2, 3))
    assert torch.allclose(whole["val/latent_square"], square, rtol=0.02)
    parts = [latent_moments(DiagonalGaussianDistribution(x), "val") for x in parameters.split(2)]
    for key, value in whole.items():
        assert torch.allclose((parts[0][key] + parts[1][key]) / 2, value, atol=1e-5)
