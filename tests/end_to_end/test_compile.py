"""`training.compile`: the model's parts as kernels of this machine, in runs as users start them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.cli.main import main
from kl_vae.training.compilation import check_compiler, compile_parts
from kl_vae.training.config import TrainingConfig
from tests.end_to_end.test_recipe import GAN
from tests.processes import TRAIN, assert_same, checkpoint, metrics

HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler")

# one level, 8 x 8 pixels: what a compilation takes grows with the number of parts
SMALL = ["model.params.ddconfig.ch_mult=[1]", "model.params.ddconfig.attn_resolutions=[]"]
SMALL += ["data.resize=8", "data.crop=8", "data.validation.fraction=0.3"]


def train(*arguments: str) -> int:
    return main(["train", "tiny.yaml", *arguments])


@needs_compiler
def test_a_compiled_run_learns_the_same_and_goes_on_bit_for_bit(project: Path) -> None:
    arguments = [*SMALL, *GAN, "training.max_steps=4", "training.validate_every_steps=2"]
    assert train("--run-dir", "plain", *arguments) == 0
    arguments.append("training.compile=true")
    assert train("--run-dir", "whole", *arguments) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for steps in (2, 4):  # the second part begins with a validation's sizes already seen
        last = f"training.max_steps={steps}"
        assert train("--run-dir", "parts", *arguments, last) == 0
    whole, parts = checkpoint("whole", 4), checkpoint("parts", 4)
    for key in ("model", "ema", "ema_updates", "updaters"):
        assert_same(whole[key], parts[key])
    for key in ("model", "ema"):
        plain = checkpoint("plain", 4)[key]
        assert whole[key].keys() == plain.keys()  # no _orig_mod.
        assert all(torch.allclose(whole[key][k], plain[k], atol=1e-4) for k in plain)
    for ours, theirs in zip(metrics("whole"), metrics("plain"), strict=True):
        for key in ("train/rec_loss", "train/d_weight", "val/psnr"):
            assert ours.get(key) == pytest.approx(theirs.get(key), rel=1e-3), key
    AutoEncoderKL.from_checkpoint("whole")


@needs_compiler
def test_compiled_parts_have_the_gradients_of_the_plain_ones(tiny_ddconfig: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = AutoEncoderKL(tiny_ddconfig | {"ch_mult": [1], "attn_resolutions": []}, 3)
    gradients = []
    for kind in ("plain", "norms", "blocks"):
        if kind == "norms":
            compile_parts(model, TrainingConfig(max_steps=1))
        if kind != "plain":
            model.set_activation_checkpointing(kind)
        model.zero_grad()
        torch.manual_seed(1)
        images = torch.rand(2, 3, 8, 8)
        reconstruction, _ = model(images, noise=torch.zeros(2, 3, 8, 8))
        (reconstruction - images).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for compiled in gradients[1:]:
        for one, other in zip(gradients[0], compiled, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_without_a_compiler_a_run_ends_with_what_to_install(project: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(project / "cache")
    command = [*TRAIN, "--run-dir", "run", "--device=cpu", "training.compile=true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "training.compile=true: torch.compile does not work on cpu here (" in line
    assert line.endswith("; install a C++ compiler (such as g++), or set training.compile to false")
    assert "Traceback" not in done.stderr
    assert not (project / "run").exists()


@needs_compiler
def test_a_machine_that_can_compile_passes() -> None:
    check_compiler(torch.device("cpu"))
