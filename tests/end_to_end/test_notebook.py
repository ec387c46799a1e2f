"""The notebook runs from its first cell to its last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kl_vae.cli.main import main

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    run = tmp_path / "run"
    assert main(["train", "quickstart", "--run-dir", str(run), "training.max_steps=1"]) == 0
    monkeypatch.setenv("KL_VAE_CHECKPOINT", str(run))
    monkeypatch.setenv("KL_VAE_STEPS", "2")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=os.fspath(tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "dB before" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
