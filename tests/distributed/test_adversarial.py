"""GAN steps on two gloo ranks and on one: the same parameters, the same weight."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.processes import TORCHRUN

WORKER = Path(__file__).with_name("adversarial_worker.py")


@pytest.fixture(autouse=True)
def squeeze_features(project: Path) -> None:
    """Random weights for the perceptual network, where the worker looks for them."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).features.state_dict(), project / "squeeze.pth")


def steps(
    name: str,
    ranks: int = 1,
    accumulate: int = 1,
    weighting: str = "global",
    precision: str = "fp32",
    broken_rank: int = -1,
) -> list[dict[str, Any]]:
    """Five steps, of one rank in this process; what each rank wrote."""
    arguments = [str(WORKER), name, str(accumulate), weighting, precision, str(broken_rank)]
    if ranks == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            runpy.run_path(str(WORKER))
    else:
        command = [*TORCHRUN, f"--nproc-per-node={ranks}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    return [torch.load(f"{name}_{rank}.pt", weights_only=True) for rank in range(ranks)]


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def assert_same_steps(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Parameters of autoencoder, discriminator and average, and figures of each step."""
    assert any(key.startswith("loss.discriminator.") for key in one["model"])
    assert largest_difference(one["model"], other["model"]) < 1e-5
    assert largest_difference(one["ema"], other["ema"]) < 1e-5
    for ours, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert theirs[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_two_ranks_learn_what_one_does() -> None:
    """The adaptive weight compares gradients averaged over the ranks."""
    (one,) = steps("one")
    two = steps("two", ranks=2)
    for rank in two:
        assert_same_steps(one, rank)
    assert largest_difference(two[0]["model"], two[1]["model"]) == 0.0
    first, *later = one["metrics"]
    assert "train/d_weight" not in first and "train/logits_real" not in first
    assert two[0]["metrics"][1]["train/d_weight"] == pytest.approx(
        later[0]["train/d_weight"], rel=1e-5
    )
    assert all(figures["train/d_weight"] > 0 for figures in later)
    assert all(figures["train/disc_grad_norm"] > 0 for figures in later)


@pytest.mark.slow
def test_accumulation_learns_the_same_with_a_fixed_weight() -> None:
    (one,) = steps("one", weighting="fixed")
    (accumulated,) = steps("accumulated", accumulate=4, weighting="fixed")
    assert_same_steps(one, accumulated)
    for rank in steps("both", ranks=2, accumulate=2, weighting="fixed"):
        assert_same_steps(one, rank)


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_skipped_on_both_and_leaves_no_nan() -> None:
    ranks = steps("fp16", ranks=2, precision="fp16", broken_rank=1)
    assert largest_difference(ranks[0]["model"], ranks[1]["model"]) == 0.0
    for rank in ranks:
        # the loss itself was not finite: that is not the scaler's doing
        assert rank["skips"]["total"] == 1
        assert rank["skips"] == ranks[0]["skips"] and rank["scales"] == ranks[0]["scales"]
        assert rank["scales"][0] < 2.0**16  # the scale is lowered
        for state in (rank["model"], rank["ema"]):
            assert all(x.isfinite().all() for x in state.values())
        broken = rank["metrics"][2]
        assert not torch.tensor(broken["train/total_loss"]).isfinite()  # shown as it was
        assert torch.tensor(rank["metrics"][-1]["train/total_loss"]).isfinite()
