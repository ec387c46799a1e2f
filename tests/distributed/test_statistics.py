"""`kl-vae encode --statistics` on two processes under torchrun, with gloo on the CPU."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.cli.main import main
from tests.messages import is_about
from tests.processes import SCRIPT, TORCHRUN

ENCODE = str(Path(SCRIPT).with_name("encode.py"))


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(
    tmp_path: Path,
    tiny_ddconfig: dict[str, Any],
    tiny_model: AutoEncoderKL,
    make_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nine images, of which one is bad: a rank has a batch more than the other, of one image."""
    monkeypatch.chdir(tmp_path)
    params = {"ddconfig": tiny_ddconfig, "embed_dim": 3}
    content = {"model": tiny_model.state_dict(), "config": {"model": {"params": params}}, "step": 1}
    write_checkpoint(Path("model.pt"), content)
    make_images(tmp_path / "images", 9)
    Path("images/003.png").write_bytes(b"nothing of the kind")
    arguments = ["--checkpoint", "model.pt", "--images", "images", "--batch-size", "2"]
    arguments += ["--num-workers", "1", "--device", "cpu", "--statistics"]
    assert main(["encode", *arguments, "one.pt"]) == 1

    command = [*TORCHRUN, "--nproc-per-node=2", ENCODE, *arguments, "two.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr  # as one process, since an image was skipped
    assert sum(is_about(line, "images/003.png") for line in done.stderr.splitlines()) == 1
    lines = done.stdout.splitlines()
    assert sum(is_about(line, "8 images", 3, "scale_factor") for line in lines) == 1
    assert is_about(lines[-1], "two.pt")
    one, two = (
        torch.load(path, weights_only=True)["config"]["model"]["params"]["latents"]
        for path in ("one.pt", "two.pt")
    )
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-6), key
