"""metrics.jsonl, also after a resume and on a full disk."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.optim.config import OptimizerConfig
from kl_vae.training.logging import LineFile, RunLogger, to_numbers
from kl_vae.training.state import Network, TrainingState
from tests.messages import is_about

SPLITS = ("train", "val")


def state_at(step: int, ddconfig: dict[str, object]) -> TrainingState:
    model = AutoEncoderKL(ddconfig, 4)
    network = Network.build(model.own_parameters(), OptimizerConfig(), "fp32")
    return TrainingState(model, network, {}, "", step=step)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_of_repeated_steps_and_truncated_lines_are_dropped(
    tmp_path: Path, tiny_ddconfig: dict[str, object]
) -> None:
    """A validation of the resumed step stays: it was completed after the checkpoint was saved."""
    lines = [
        f'{{"step": {step}, "{split}/psnr": 1.5}}'
        for step in range(1, 6)
        for split in ("train", "val")
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "tra')
    RunLogger(tmp_path, state_at(3, tiny_ddconfig), 10).close()
    assert steps(tmp_path) == [1, 1, 2, 2, 3, 3]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:6]


def test_the_speed_of_steps_that_are_shorter_than_a_tick_of_a_clock(
    tmp_path: Path, tiny_ddconfig: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows time.monotonic changes every 16 ms."""
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    state = state_at(0, tiny_ddconfig)
    run_logger = RunLogger(tmp_path, state, 10)
    for step in (1, 2):
        state.step, state.images_seen = step, 8 * step
        run_logger.log_step({"train/total_loss": 1.0, "train/psnr": 20.0})
    run_logger.close()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert all(0.0 < line["images_per_second"] < math.inf for line in lines)


def test_failed_writes_of_images_and_events_are_warnings(
    tmp_path: Path, tiny_ddconfig: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    run_logger = RunLogger(tmp_path, state_at(0, tiny_ddconfig), 10)

    class Broken:
        def __getattr__(self, name: str) -> object:
            raise OSError(28, "No space left on device")

    run_logger._tensorboard = Broken()
    (tmp_path / "samples").write_text("a file")
    for _ in range(2):
        image = torch.zeros(3, 4, 4, dtype=torch.uint8)
        run_logger.log_validation({"val/psnr": 1.0}, {"prior": image})
    run_logger.close()
    assert steps(tmp_path) == [0, 0]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert sum(is_about(text, tmp_path / "samples", "File exists") for text in warnings) == 2
    assert sum(is_about(text, "TensorBoard", "No space left") for text in warnings) == 1


def test_nan_is_written_as_a_string(tmp_path: Path, tiny_ddconfig: dict[str, object]) -> None:
    state = state_at(0, tiny_ddconfig)
    run_logger = RunLogger(tmp_path, state, 10)
    state.step = 1
    run_logger.log_step({"train/total_loss": math.nan, "train/psnr": 1.5})
    run_logger.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: 1 / 0)
    assert line["train/total_loss"] == "nan" and line["train/psnr"] == 1.5


class FullDisk:
    """A file on a disk that has room for `room` more bytes."""

    def __init__(self, file: object, room: int) -> None:
        self._file = file
        self.room = room

    def write(self, text: bytes) -> int:
        taken = min(len(text), self.room)
        if not taken:
            raise OSError(28, "No space left on device")
        self.room -= taken
        return int(self._file.write(text[:taken]))  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_lines_are_kept_while_the_disk_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    path.write_text("before\n")
    file = LineFile(path)
    disk = FullDisk(file._file, room=8)
    file._file = disk  # type: ignore[assignment]
    file.append("one")
    for line in ("two and more", "three"):
        file.append(line)
        assert path.read_text() == "before\none\n"
    (message,) = caplog.messages
    assert is_about(message, path, "No space left on device")
    disk.room = 100
    file.append("four")
    file.close()
    assert path.read_text() == "before\none\ntwo and more\nthree\nfour\n"


def test_averages_become_plain_numbers() -> None:
    """Scalars stay scalars, NaN stays NaN, and second moments become standard deviations."""
    means = {
        "train/psnr": torch.tensor(3.0),
        "train/loss": torch.tensor(torch.nan),
        "train/latent_mean": torch.tensor([1.0, -2.0]),
        "train/latent_square": torch.tensor([10.0, 4.0]),
    }
    numbers = to_numbers(means)
    assert str(numbers.pop("train/loss")) == "nan"
    assert numbers == {
        "train/psnr": 3.0,
        "train/latent_mean": [1.0, -2.0],
        "train/latent_std": [3.0, 0.0],
    }
