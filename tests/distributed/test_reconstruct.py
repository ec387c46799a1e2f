"""`kl-vae reconstruct` on two processes under torchrun, with gloo on the CPU."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.cli.main import main
from tests.messages import is_about
from tests.processes import SCRIPT, TORCHRUN, Running, descendants
from tests.tiny import tiny_ddconfig, tiny_model

RECONSTRUCT = str(Path(SCRIPT).with_name("reconstruct.py"))
NUMBER, SIZES, BAD = 1000, 50, 7
DDCONFIG = tiny_ddconfig(attn_type="none")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a checkpoint, 1000 images of 50 sizes, and a bad one."""
    monkeypatch.chdir(tmp_path)
    params = {"ddconfig": DDCONFIG, "embed_dim": 2}
    model = tiny_model(attn_type="none")
    content = {"model": model.state_dict(), "config": {"model": {"params": params}}, "step": 1}
    write_checkpoint(Path("model.pt"), content)
    rng = np.random.default_rng(0)
    for i in range(NUMBER):
        path = Path("images", f"{i % 10}", f"{i:03d}.bmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        size = 11 + i % SIZES // 2, 12 + i % 2
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    Path("images", "5", f"{BAD}.bmp").write_bytes(b"nothing of the kind")
    return tmp_path


def tree(folder: str) -> dict[str, bytes]:
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_write_what_one_does(project: Path) -> None:
    arguments = ["--checkpoint", "model.pt", "--images", "images", "--mode", "sample"]
    arguments += ["--device", "cpu", "--num-workers", "1", "--out"]
    assert main(["reconstruct", *arguments, "one"]) == 1  # an image was skipped
    expected = tree("one")

    command = [*TORCHRUN, "--nproc-per-node=2", RECONSTRUCT, *arguments, "two"]
    records = Path("two", ".unfinished")
    with Running(*command) as killed:
        killed.wait_until(lambda: len(list(records.glob("0*.json"))) >= 20)
        for pid in (killed.pid, *descendants(killed.pid)):
            with suppress(ProcessLookupError):  # a worker ends with its rank
                os.kill(pid, signal.SIGKILL)
        killed.end()
    done = len(list(records.glob("0*.json")))
    assert 20 <= done < 67
    Path("two", "0", ".123.tmp").write_bytes(b"half of an image")

    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=240)
    assert resumed.returncode == 1, resumed.stderr
    (last_line,) = resumed.stdout.splitlines()
    assert is_about(last_line, "1000 images", "PSNR")
    found = tree("two")
    assert found.keys() == expected.keys()
    # the page and the summary name neither ranks nor the folder
    assert [name for name in expected if found[name] != expected[name]] == []

    with open("two/metrics.csv", newline="") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    assert len(set(names)) == len(names) == NUMBER
