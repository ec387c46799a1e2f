"""The plain step: the same gradients and the same update as diffusers' modules give."""

from typing import Any

import pytest
import torch

from kl_vae.benchmark import flops, plain_comparison
from kl_vae.benchmark.plain_comparison import WHOLE_STEP, compare_plain_steps
from kl_vae.benchmark.plain_step import (
    KL_WEIGHT,
    STEP_WAYS,
    PlainStep,
    build_ours,
    build_way,
    our_forward,
    step_input,
    their_steps,
)
from kl_vae.checkpoints.diffusers import to_diffusers
from kl_vae.ddconfig import DDConfig
from kl_vae.runtime.errors import RunError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_SIDE", 64)


@pytest.fixture
def ddconfig(tiny_ddconfig: dict[str, Any]) -> DDConfig:
    return DDConfig.from_dict(tiny_ddconfig)


def test_the_loss_by_hand(ddconfig: DDConfig) -> None:
    model = build_ours(ddconfig, 4, CPU)
    images, noise = step_input(ddconfig, 4, 2, 16, CPU)
    assert images.shape == (2, 3, 16, 16) and noise.shape == (2, 4, 8, 8)
    assert -1.0 <= images.min() and images.max() <= 1.0
    step = PlainStep(our_forward(model), torch.optim.SGD(model.parameters(), lr=0.0), CPU)
    reconstruction, posterior = model(images, noise=noise)
    expected = (reconstruction - images).square().mean() + KL_WEIGHT * posterior.kl().mean()
    torch.testing.assert_close(step.loss(images, noise), expected)


def test_both_move_the_weights_alike(ddconfig: DDConfig) -> None:
    pytest.importorskip("diffusers")
    model = build_ours(ddconfig, 4, CPU)
    images, noise = step_input(ddconfig, 4, 1, 16, CPU)
    ours = PlainStep(our_forward(model), torch.optim.SGD(model.parameters(), lr=0.1), CPU)
    before = {key: x.clone() for key, x in to_diffusers(model.state_dict()).items()}
    for twin, theirs in their_steps(model, CPU, "fp32").values():
        for group in theirs.optimizer.param_groups:
            assert group["lr"] == 1e-6
        theirs.optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        theirs(images, noise)
    ours(images, noise)
    for key, x in to_diffusers(model.state_dict()).items():
        torch.testing.assert_close(twin.state_dict()[key], x, rtol=1e-4, atol=1e-6)
    moved = [not torch.equal(before[key], x) for key, x in twin.state_dict().items()]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize("embed_dim", [3, 4])
def test_a_comparison(ddconfig: DDConfig, embed_dim: int) -> None:
    pytest.importorskip("diffusers")
    measured = compare_plain_steps(ddconfig, embed_dim, CPU, size=16, repeats=1, precision="bf16")
    theirs = ["diffusers", "diffusers, channels_last, fused AdamW"] if embed_dim == 4 else []
    assert [m.way for m in measured] == [*theirs, *STEP_WAYS, WHOLE_STEP]
    assert measured[0].difference == 0.0 and measured[-1].difference is None
    for m in measured[1:-1]:
        assert m.difference is not None and m.difference < 1e-4
    assert all(m.timing.median > 0.0 and m.synchronisations is None for m in measured)


def test_a_scaler_in_half_precision(ddconfig: DDConfig) -> None:
    model = build_ours(ddconfig, 4, CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = PlainStep(our_forward(model), optimizer, CPU, "fp16")
    assert step.scaler.is_enabled()
    before = model.decoder.conv_out.weight.clone()
    step(*step_input(ddconfig, 4, 1, 16, CPU))
    assert not torch.equal(before, model.decoder.conv_out.weight)


def test_steps_with_other_gradients_are_not_compared(
    ddconfig: DDConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*args: Any) -> Any:
        model = build_way(*args)
        torch.nn.init.zeros_(model.decoder.conv_out.weight)
        return model

    monkeypatch.setattr(plain_comparison, "build_way", other)
    text = r"^ours, plain modules: its gradients differ by \d.*, which is more than rounding \(1e-0"
    with pytest.raises(RunError, match=text):
        compare_plain_steps(ddconfig, 4, CPU, size=16)
