"""`kl-vae encode --out` on two processes under torchrun, killed and taken up again."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.cli.main import main
from kl_vae.inference.progress import FOLDER
from tests.messages import is_about
from tests.processes import SCRIPT, TORCHRUN, Running

pytest.importorskip("safetensors")

ENCODE = str(Path(SCRIPT).with_name("encode.py"))

# a disk that stops after the second shard of each rank
STUCK = """
import time
from kl_vae.inference.latent_folder import LatentFolder

write, written = LatentFolder.write, []

def write_two(*args):
    if len(written) == 2:
        time.sleep(600)
    written.append(1)
    return write(*args)

LatentFolder.write = write_two
"""


@pytest.mark.slow
def test_killed_on_two_ranks_and_taken_up_on_one_and_on_two(
    tmp_path: Path,
    tiny_ddconfig: dict[str, Any],
    tiny_model: AutoEncoderKL,
    make_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thirteen images in seven shards, of which one is bad."""
    monkeypatch.chdir(tmp_path)
    params = {"ddconfig": tiny_ddconfig, "embed_dim": 3}
    content = {"model": tiny_model.state_dict(), "config": {"model": {"params": params}}, "step": 1}
    write_checkpoint(Path("model.pt"), content)
    make_images(tmp_path / "images", 13)
    Path("images/003.png").write_bytes(b"nothing of the kind")
    Path("stuck.py").write_text(STUCK)
    arguments = ["--checkpoint", "model.pt", "--images", "images", "--shard-size", "2"]
    arguments += ["--what", "sample", "--num-workers", "0", "--device", "cpu", "--out"]
    assert main(["encode", *arguments, "whole"]) == 1
    whole = {path.name: path.read_bytes() for path in Path("whole").iterdir()}
    assert len(whole) == 7 + 2  # shards, index.json and sources.jsonl

    command = [*TORCHRUN, "--nproc-per-node=2", ENCODE, *arguments, "one"]
    with Running(*command, "--import", "stuck") as running:
        running.wait_until(lambda: len(list(Path("one", FOLDER).glob("0*.json"))) == 4)
    assert running.end() == -signal.SIGKILL
    assert not Path("one/index.json").exists()
    shutil.copytree("one", "two")

    assert main(["encode", *arguments, "one", "--resume"]) == 1
    assert {path.name: path.read_bytes() for path in Path("one").iterdir()} == whole

    command[-1] = "two"
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr  # as one process, since an image was skipped
    assert {path.name: path.read_bytes() for path in Path("two").iterdir()} == whole
    last_line = done.stdout.splitlines()[-1]
    assert is_about(last_line, "12 images", "7 shards", "two", "scale_factor", "1 skipped")
