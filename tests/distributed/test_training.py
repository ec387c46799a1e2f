"""Real runs of two processes under torchrun, with gloo on the CPU."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kl_vae.cli.main import main
from tests.messages import is_about
from tests.processes import TORCHRUN

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
WORKER = Path(__file__).with_name("validation_worker.py")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run on two ranks."""
    command = [*TORCHRUN, "--nproc-per-node=2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def weights(run: str, step: int) -> dict[str, torch.Tensor]:
    path = Path(run) / "checkpoints" / f"step_{step:08d}.pt"
    content: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return content


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def figures(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_ranks_and_accumulation_do_not_change_what_is_learned(project: Path) -> None:
    """20 steps at the same global batch: one process, two, and one that accumulates."""
    arguments = ["tiny.yaml", "training.max_steps=20", "training.validate_every_steps=20"]
    assert main(["train", *arguments, "--run-dir", "one"]) == 0
    done = torchrun(str(SCRIPTS / "train.py"), *arguments, "--run-dir", "two")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b8 images .*= 2 .* x 1 .* x 4\b", done.stderr)
    accumulating = [*arguments, "training.accumulate_batches=4"]
    assert main(["train", *accumulating, "--run-dir", "accumulated"]) == 0
    done = torchrun(str(SCRIPTS / "train.py"), *accumulating, "--run-dir", "both")
    assert done.returncode == 0, done.stderr

    one = weights("one", 20)
    before = weights_at_the_start()
    assert largest_difference(one, before) > 1e-4  # it has learned something
    for run in ("two", "accumulated", "both"):
        assert largest_difference(one, weights(run, 20)) < 1e-5, run
        for ours, theirs in zip(figures("one"), figures(run), strict=True):
            for key in ours.keys() - {"images_per_second"}:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5, abs=1e-5), (run, key)


def weights_at_the_start() -> dict[str, torch.Tensor]:
    from kl_vae import AutoEncoderKL
    from kl_vae.training.config import RunConfig

    config = RunConfig.load("tiny.yaml")
    torch.manual_seed(config.training.seed)
    params = config.model.params
    return AutoEncoderKL(params.ddconfig, params.embed_dim, params.lossconfig).state_dict()


def test_validation_is_exact_for_any_number_of_images(
    project: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets of 1, 5 and 7 images: one rank has fewer, or none, and each image counts once."""
    make_images(project / "images", 24)
    results = {}
    monkeypatch.setattr(sys, "argv", [str(WORKER), "figures_1.json"])
    runpy.run_path(str(WORKER))
    done = torchrun(str(WORKER), "figures_2.json")
    assert done.returncode == 0, done.stderr
    for ranks in (1, 2):
        results[ranks] = json.loads(Path(f"figures_{ranks}.json").read_text())
    assert results[1].keys() == results[2].keys() == {"1", "5", "7"}
    for number, one in results[1].items():
        assert one.keys() == results[2][number].keys()
        assert {"val/psnr", "val/ssim", "val/rec_loss", "val/kl_loss"} <= one.keys()
        for key, value in one.items():
            assert results[2][number][key] == pytest.approx(value, rel=1e-6, abs=1e-6), key


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(project: Path) -> None:
    """1 -> 2 -> 1 ranks take the same samples in the same steps as one rank throughout."""
    arguments = ["tiny.yaml", "training.validate_every_steps=100"]
    assert main(["train", *arguments, "training.max_steps=9", "--run-dir", "whole"]) == 0
    parts = [*arguments, "--run-dir", "parts"]
    assert main(["train", *parts, "training.max_steps=3"]) == 0
    done = torchrun(str(SCRIPTS / "train.py"), *parts, "training.max_steps=6")
    assert done.returncode == 0, done.stderr
    assert main(["train", *parts, "training.max_steps=9"]) == 0
    assert largest_difference(weights("whole", 9), weights("parts", 9)) < 1e-5


@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line(project: Path) -> None:
    done = torchrun(str(SCRIPTS / "train.py"), "tiny.yaml", "--run-dir", "images")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "--run-dir" in line]
    assert line.startswith("kl-vae train: error: ") and is_about(line, "images")
    assert not Path("images/config.yaml").exists()
