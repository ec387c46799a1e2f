"""A training step on simulated GPUs: no device mismatch, one wait, one copy, one collective."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulated_gpu.conftest import Run

pytestmark = pytest.mark.slow

# DDP arranges its buckets in the first two steps, and reads its own timers in the first ten
DDP_STEPS = 11

GAN = (
    "model.params.monitor=null",
    "model.params.lossconfig={target: lpips_with_discriminator, params: {disc_start: 0, "
    "perceptual_weight: 0.0, disc_num_layers: 1, disc_ndf: 8}}",
)
LOSS = "model.params.lossconfig.params"
MUON = (
    *("optimizer.name=muon", "optimizer.learning_rate=0.01"),
    *("discriminator_optimizer.name=muon", "discriminator_optimizer.learning_rate=0.01"),
)

# precision, overrides of the config, and collectives of a step by module, with two ranks
OPTIONS: dict[str, tuple[str, tuple[str, ...], dict[str, int]]] = {
    "elbo": ("fp32", (), {}),
    "average, equivariance": ("bf16", ("training.ema_decay=0.9", "training.equivariance=0.5"), {}),
    "logvar, muon": ("fp16", (f"{LOSS}.learn_logvar=true", *MUON[:2]), {"muon": 1}),
    # batch norm: forward and backward, for the adversarial term, real and fake images
    "gan": ("bf16", GAN, {"adversarial": 1, "batch_norm": 6}),
    "gan, lecam, muon, accumulation": (
        "fp16",
        (*GAN, *MUON, f"{LOSS}.lecam_weight=0.1", "training.accumulate_batches=2"),
        {"adversarial": 2, "batch_norm": 12, "muon": 2},
    ),
    "gan, fixed weight, actnorm": (
        "fp32",
        (*GAN, f"{LOSS}.disc_weighting=fixed", f"{LOSS}.disc_norm=act"),
        {},
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_one_gpu(simulated: Run, option: str) -> None:
    found = train(simulated, option, gpus=1)
    for step in found["steps"][1:]:  # act norms read whether they are initialised
        assert (step["waits"], step["copies"], step["collectives"]) == (1, 1, {}), step


@pytest.mark.parametrize("option", OPTIONS)
def test_two_gpus(simulated: Run, option: str) -> None:
    found = train(simulated, option, gpus=2)
    expected = {"guards": 1, **OPTIONS[option][2]}
    for step in found["steps"][DDP_STEPS:]:
        assert (step["waits"], step["copies"]) == (1, 1), step
        assert step["collectives"] == {f"{key} nccl": n for key, n in expected.items()}


def test_without_triton_nothing_is_compiled(simulated: Run) -> None:
    small = ("model.params.ddconfig.ch_mult=[1]", "model.params.ddconfig.attn_resolutions=[]")
    found = train(simulated, "elbo", gpus=1, compile="auto", more=small)
    for step in found["steps"][1:]:
        assert (step["waits"], step["copies"]) == (1, 1), step


def train(
    simulated: Run, option: str, gpus: int, compile: str = "false", more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Train with validation; check the log lines, and return the counts."""
    precision, overrides, _ = OPTIONS[option]
    steps = 3 if gpus == 1 else DDP_STEPS + 2
    found = simulated(
        *("train", "tiny.yaml", "--run-dir", "run", *overrides),
        *(f"training.precision={precision}", f"training.max_steps={steps}"),
        *("training.global_batch_size=4", f"training.compile={compile}", *more),
        gpus=gpus,
    )
    assert len(found["steps"]) == len(found["lines"]) == steps
    for line in found["lines"]:
        assert line["copies"] == line["waits"] == 1, line
    return found
