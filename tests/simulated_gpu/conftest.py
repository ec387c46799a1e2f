"""Commands on simulated GPUs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import TORCHRUN, run_to_its_end
from tests.simulated_gpu.build import build, environment, why_not

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that simulates GPUs, built once."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"GPUs cannot be simulated: {reason}")
    return build(tmp_path_factory.mktemp("simulated_gpu"))


@pytest.fixture
def simulated(library: Path, project: Path) -> Run:
    """Run a command on simulated GPUs, `simulated("train", ..., gpus=2)`; return its counts."""

    def run(*arguments: str, gpus: int = 1) -> dict[str, Any]:
        ranks = [*TORCHRUN, f"--nproc-per-node={gpus}"] if gpus > 1 else [sys.executable]
        child = str(Path(__file__).with_name("child.py"))
        counts = project / "counts.json"
        variables = {**environment(library, gpus), "PYTHONPATH": str(ROOT)}
        code, errors = run_to_its_end(*ranks, child, str(counts), *arguments, **variables)
        assert code == 0, errors
        found: dict[str, Any] = json.loads(counts.read_text())
        return found

    return run
