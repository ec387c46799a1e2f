"""Commands that are disturbed at random moments: the next command ends with the same bytes.

Each command is killed `--moments` times; the other disturbances happen a fifth as often.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kl_vae.checkpoints.run_files import HISTORY, METRICS, STATUS, TENSORBOARD
from tests.interruptions import (
    CTRL_C,
    DISK_FULL,
    KILL,
    Moment,
    Outcome,
    lose_power,
    run_command,
)
from tests.processes import metrics, without_speed
from tests.tiny import save_tiny_model, tiny_ddconfig

IMAGES = ["--images", "../images", "--num-workers", "0", "--batch-size", "2", "--device", "cpu"]
MODEL = ["--checkpoint", "../model.pt", "--config", "../model.yaml"]
COMMANDS = {
    "train": ["train", "../tiny.yaml", "--run-dir", "run", "--device", "cpu"],
    "reconstruct": ["reconstruct", *MODEL, *IMAGES, "--out", "out"],
    "encode": ["encode", *MODEL, *IMAGES, "--out", "out"],
    "evaluate": ["evaluate", *MODEL, *IMAGES, "--crop", "16", "--out", "out"],
    "sample": ["sample", *MODEL, "--number", "5", "--batch-size", "2", "--out", "out"],
    "convert": ["convert", "../model.pt", "vae", "--config", "../model.yaml", "--to", "diffusers"],
    "export": ["export", *MODEL, "--out", "vae.pt"],
    "report": ["report", "../finished/run", "--out", "report.html"],
}
WITHOUT_RESUME = ("convert", "export")
DISTURBANCES = {"kill": KILL, "power loss": KILL, "Ctrl-C": CTRL_C, "disk full": DISK_FULL}
CODES = {"kill": (0, -9), "power loss": (0, -9), "Ctrl-C": (0, 130), "disk full": (0, 1, 2)}
ELSEWHERE = {  # where a run saves another step, and continues without samples
    ("train", "Ctrl-C"): "test_train.py::test_ctrl_c_saves_and_the_same_command_goes_on",
    ("train", "disk full"): "test_faults.py::test_a_full_disk",
}
RESUMABLE = ("reconstruct", "encode", "evaluate", "sample")


@dataclass
class Undisturbed:
    """What a command leaves if nothing disturbs it, and how long that takes."""

    files: dict[str, Any]
    outcome: Outcome


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a model, and the config of a run that saves often."""
    from tests.conftest import write_images

    folder = tmp_path_factory.mktemp("inputs")
    write_images(folder / "images", 10)
    save_tiny_model(folder)
    loss = {"target": "elbo", "params": {"kl_weight": 1.0e-4}}
    params = {"embed_dim": 2, "ddconfig": tiny_ddconfig(), "lossconfig": loss}
    training = {"global_batch_size": 4, "max_steps": 6, "log_every_steps": 1, "ema_decay": 0.9}
    training |= {"save_every_steps": 2, "validate_every_steps": 3, "sample_images": 1}
    data = {"train": {"root": "../images"}, "validation": {"fraction": 0.2}, "num_workers": 0}
    config = {"model": {"params": {**params, "monitor": "val/rec_loss"}}, "data": data}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**config, "training": training}))
    (folder / "finished").mkdir()
    assert run_command(COMMANDS["train"], folder / "finished").code == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(inputs: Path) -> Callable[[str], Undisturbed]:
    known: dict[str, Undisturbed] = {}

    def run(name: str) -> Undisturbed:
        if name not in known:
            folder = inputs / f"{name}-undisturbed"
            folder.mkdir()
            outcome = run_command(COMMANDS[name], folder)
            assert outcome.code == 0, log_of(folder)
            known[name] = Undisturbed(files_of(folder), outcome)
        return known[name]

    return run


def files_of(folder: Path) -> dict[str, Any]:
    """The content of all files; of those that state times or processes what does not."""
    files: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        files[name] = path.read_bytes() if path.is_file() else None
        if path.name == STATUS:
            files[name] = json.loads(files[name])["state"]
        elif path.name == METRICS:
            files[name] = without_speed(metrics(path.parent))
        elif path.name == "report.html":  # which states the time
            files[name] = files[name].rstrip().endswith(b"</html>")
        elif path.name == HISTORY or path.parent.name == TENSORBOARD:
            del files[name]  # each process adds to these
    return files


def log_of(folder: Path) -> str:
    return folder.with_name(f"{folder.name}.log").read_text()


def moments(disturbance: signal.Signals | OSError, number: int, whole: Outcome) -> Iterator[Moment]:
    """Of signals half at a time, half before an operation; errors occur in operations."""
    rng = random.Random(str(disturbance))
    for i in range(number):
        if i % 2 and isinstance(disturbance, signal.Signals):
            yield Moment(disturbance, seconds=rng.uniform(0.0, whole.seconds))
        else:
            yield Moment(disturbance, operation=rng.randrange(whole.operations))


@pytest.mark.slow
@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("name", COMMANDS)
def test_the_next_command_ends_with_the_same_bytes(
    name: str,
    disturbance: str,
    inputs: Path,
    undisturbed: Callable[[str], Undisturbed],
    request: pytest.FixtureRequest,
) -> None:
    if (name, disturbance) in ELSEWHERE:
        pytest.skip(f"in {ELSEWHERE[name, disturbance]}")
    whole = undisturbed(name)
    number = request.config.getoption("--moments") // (1 if disturbance == "kill" else 5)
    what = DISTURBANCES[disturbance]
    for i, moment in enumerate(moments(what, number, whole.outcome)):
        folder = inputs / f"{name}-{disturbance}-{i}"
        folder.mkdir()
        disk = None
        if disturbance == "power loss":
            disk = inputs / "disk"
            disk.mkdir()
        code = run_command(COMMANDS[name], folder, moment, disk).code
        assert code in CODES[disturbance], (moment, code, log_of(folder))
        assert "Traceback" not in log_of(folder), (moment, log_of(folder))
        if disk is not None:
            lose_power(folder, disk, random.Random(i))
        before = files_of(folder) if name in WITHOUT_RESUME else {}
        resume = ["--resume"] if name in RESUMABLE else []
        code = run_command([*COMMANDS[name], *resume], folder).code
        refuses = bool(before) and whole.files.items() <= before.items()
        assert code == (2 if refuses else 0), (moment, log_of(folder))
        found = files_of(folder)
        assert found.keys() == whole.files.keys(), moment
        assert not [key for key in found if found[key] != whole.files[key]], moment
        shutil.rmtree(folder)
