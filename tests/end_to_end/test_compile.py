"""`training.compile`: the model's parts as kernels of this machine, in runs as users start them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.accel.compilation import can_compile
from kl_vae.cli.main import main
from tests.end_to_end.test_recipe import GAN
from tests.messages import is_about, mentions
from tests.processes import TORCHRUN, TRAIN, assert_same, checkpoint, metrics

HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler")

# torch hides the warnings of its own compiler where they are shown, which errors are not
pytestmark = pytest.mark.filterwarnings("default")

# one level, 8 x 8 pixels: what a compilation takes grows with the number of parts
SMALL = ["model.params.ddconfig.ch_mult=[1]", "model.params.ddconfig.attn_resolutions=[]"]
SMALL += ["data.resize=8", "data.crop=8", "data.validation.fraction=0.3"]


def train(*arguments: str) -> int:
    return main(["train", "tiny.yaml", *arguments])


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_learns_the_same_and_goes_on_bit_for_bit(project: Path) -> None:
    arguments = [*SMALL, *GAN, "training.max_steps=4", "training.validate_every_steps=2"]
    arguments.append("training.activation_checkpointing=blocks")
    assert train("--run-dir", "plain", *arguments) == 0
    arguments.append("training.compile=true")
    assert train("--run-dir", "whole", *arguments) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for steps in (2, 4):
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
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-3), key
    AutoEncoderKL.from_checkpoint("whole")


@pytest.mark.slow
@needs_compiler
def test_compiled_ranks_learn_what_one_does_uncompiled(project: Path) -> None:
    arguments = [*SMALL, "training.max_steps=3", "training.ema_decay=0.5"]
    command = [*TORCHRUN, "--nproc-per-node=2", *TRAIN[1:], *arguments]
    command += ["--run-dir", "two", "training.compile=true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stderr and "compiled" in done.stderr
    assert train("--run-dir", "one", *arguments) == 0
    for key in ("model", "ema"):
        two, one = checkpoint("two", 3)[key], checkpoint("one", 3)[key]
        assert two.keys() == one.keys()  # no _orig_mod., no module.
        assert all(torch.allclose(two[k], one[k], atol=1e-5) for k in one)


@pytest.mark.slow
def test_without_a_compiler_a_run_ends_with_what_to_install(project: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(project / "cache")
    command = [*TRAIN, "--run-dir", "run", "--device=cpu", "training.compile=true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert is_about(line, "training.compile=true", "torch.compile", "cpu", "g++", "false")
    assert "Traceback" not in done.stderr
    assert not (project / "run").exists()


@needs_compiler
def test_a_machine_that_can_compile_passes() -> None:
    assert can_compile(torch.device("cpu"), True)
    assert not can_compile(torch.device("cpu"), "auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.compile works on this GPU")
def test_where_it_does_not_work_auto_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    assert not can_compile(device, "auto")
    assert is_about(caplog.text, "torch.compile", "cuda", "Triton")
    with pytest.raises(ValueError, match=mentions("training.compile=true", "Triton")):
        can_compile(device, True)
