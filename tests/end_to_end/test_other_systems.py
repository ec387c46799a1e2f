"""Commands write the same bytes on systems and file systems that lack what Linux has."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kl_vae.cli.main import main
from tests.messages import is_about
from tests.shards import write_shard
from tests.tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ROOT / "tests" / "other_systems.py"

TRAIN = ["train", "tiny.yaml", "--run-dir", "run", "training.validate_every_steps=2"]
ENCODE = ["encode", "--checkpoint", "run", "--num-workers", "0", "--shard-size", "10"]
OF_RUN = ["--checkpoint", "run", "--images", "images", "--num-workers", "0"]
COMMANDS = [
    [*TRAIN, "training.max_steps=2"],
    [*TRAIN, "training.max_steps=4", "training.keep_checkpoints=2", "training.save_every_steps=1"],
    [*TRAIN, "training.max_steps=5", "data.num_workers=1"],
    ["reconstruct", *OF_RUN, "--out", "reconstructions"],
    ["reconstruct", *OF_RUN, "--out", "reconstructions", "--overwrite", "--bits", "16"],
    ["evaluate", *OF_RUN, "--out", "evaluation", "--metrics", "psnr", "ssim"],
    [*ENCODE, "--images", "images", "--out", "latents", "--statistics", "with_scale.pt"],
    [*ENCODE, "--images", "train.tar", "--out", "latents_of_shard", "--labels"],
    [*ENCODE, "--images", "train.tar", "--out", "latents_of_shard", "--labels", "--resume"],
    ["encode", "--checkpoint", "run", "--images", "train.tar", "--num-workers", "1"]
    + ["--out", "latents_of_worker"],
    ["sample", "--checkpoint", "run", "--out", "samples", "--number", "2", "--size", "16"],
    ["convert", "with_scale.pt", "vae", "--to", "diffusers"],
    ["convert", "run", "vae", "--to", "diffusers", "--overwrite"],
    ["convert", "vae", "compvis.safetensors", "--to", "compvis"],
    ["export", "--checkpoint", "run", "--out", "weights.pt"],
    ["export", "--checkpoint", "weights.pt", "--out", "again.pt"],
    ["report", "run"],
    ["report", "run", "--text"],
]
TIMES = {"time", "pid", "images_per_second", "seconds"}  # keys that differ between two runs


@pytest.fixture
def projects(project: Path) -> tuple[Path, Path]:
    """Two working directories with the same images, also as a shard with classes."""
    members = {}
    for number, path in enumerate(sorted((project / "images").iterdir())):
        members |= {f"{path.stem}.cls": b"%d" % (number % 3), path.name: path.read_bytes()}
    write_shard(project / "train.tar", members)
    shutil.copytree(project, project / "other")
    return project, project / "other"


def run_on(system: str, folder: Path, commands: list[list[str]]) -> str:
    """Run commands in a folder as on another system; return the log."""
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, SYSTEMS, system, "commands.json"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "commands.json").unlink()
    return done.stderr


def without_times(content: bytes) -> object:
    """The lines of a JSON file without the keys that depend on the time."""
    text = content.decode()
    lines = [json.loads(text)] if text.startswith("{\n") else map(json.loads, text.splitlines())
    return [{key: x for key, x in line.items() if key not in TIMES} for line in lines]


def written(folder: Path) -> dict[str, object]:
    """What commands wrote into a folder, without times."""
    contents: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith("other/"):
            continue
        contents[name] = path.read_bytes()
        if name in ("run/metrics.jsonl", "run/status.json", "run/history.jsonl"):
            assert b"\r" not in path.read_bytes(), name
            contents[name] = without_times(path.read_bytes())
        elif name == "run/report.html":
            contents[name] = b"\r" in path.read_bytes()
    return contents


def differing(here: Path, there: Path) -> list[str]:
    """The files that two folders do not share; TensorBoard names its own by the time."""
    one, other = written(here), written(there)
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if "/tensorboard/" not in name and one.get(name) != other.get(name)
    ]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_windows(projects: tuple[Path, Path]) -> None:
    here, there = projects
    for command in COMMANDS:
        assert main(command) == 0, command
    log = run_on("windows", there, COMMANDS)
    (line,) = {line for line in log.splitlines() if line.startswith("run/.lock")}
    assert is_about(line, "locked", "POSIX")
    assert differing(here, there) == []


def test_a_file_system_that_cannot_flush_folders(projects: tuple[Path, Path]) -> None:
    here, there = projects
    commands = [COMMANDS[0], [*ENCODE, "--images", "images", "--out", "latents"]]
    for command in commands:
        assert main(command) == 0, command
    run_on("network", there, commands)
    assert differing(here, there) == []


def test_a_terminal_that_cannot_show_a_name(tmp_path: Path) -> None:
    """Windows' code pages lack most characters; the work is done when its result is printed."""
    command = ["sample", *save_tiny_model(tmp_path), "--out", "größe", "--number", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "kl_vae", *command],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert is_about(done.stdout, r"gr\xf6\xdfe", "grid.png")
    assert (tmp_path / "größe" / "grid.png").is_file()


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("scripts/*.py")))
def test_data_workers_may_import_the_script_that_started_them(script: str) -> None:
    """As workers do that are not forked."""
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__mp_main__")
