"""Muon shared out to several ranks, under torchrun with gloo on the CPU."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

WORKER = Path(__file__).with_name("muon_worker.py")


def torchrun(ranks: int, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def tensors(path: Path) -> list[Tensor]:
    """Parameters and state that a rank wrote."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    states = content["optimizer"]["state"]
    values = [states[i][key] for i in sorted(states) for key in sorted(states[i])]
    return [torch.as_tensor(value) for value in (*content["parameters"], *values)]


@pytest.mark.slow
def test_all_ranks_hold_what_one_process_would_and_their_number_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two ranks, and two more of three, against one process here."""
    torchrun(2, tmp_path, "2")
    torchrun(3, tmp_path, "2", tmp_path / "2_1.pt")
    for ranks, steps in ((2, "2"), (3, "4")):
        monkeypatch.setattr(sys, "argv", [str(WORKER), str(tmp_path), steps])
        runpy.run_path(str(WORKER))
        alone, first = tensors(tmp_path / "1_0.pt"), tensors(tmp_path / f"{ranks}_0.pt")
        for a, b in zip(alone, first, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0.0)
        for rank in range(1, ranks):
            for a, b in zip(first, tensors(tmp_path / f"{ranks}_{rank}.pt"), strict=True):
                assert torch.equal(a, b)
