"""Saving a run: what is kept, and what happens when it fails."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kl_vae.training.checkpoints import Checkpoints
from kl_vae.training.updater import Updater

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.checkpoint import read_checkpoint
from kl_vae.checkpoints.run_directory import (
    best_checkpoint,
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
)
from kl_vae.optim.config import OptimizerConfig
from kl_vae.runtime.errors import RunError
from kl_vae.training.ema import WeightAverage
from kl_vae.training.state import TrainingState


@pytest.fixture
def state(tiny_ddconfig: dict[str, object]) -> TrainingState:
    model = AutoEncoderKL(tiny_ddconfig, 4)
    updater = Updater.build(model.own_parameters(), OptimizerConfig(name="adam"), "fp32")
    return TrainingState(model, updater, {}, "", average=WeightAverage(model, 0.9))


def save_steps(run: Path, state: TrainingState, steps: Iterator[int] | range, keep: int) -> None:
    checkpoints = Checkpoints(run, state, keep, resumed=None)
    for state.step in steps:
        checkpoints.save()


def kept_steps(run: Path) -> list[int]:
    return [int(path.stem.removeprefix("step_")) for path in list_checkpoints(run)]


def test_the_newest_and_the_best_are_kept(tmp_path: Path, state: TrainingState) -> None:
    checkpoints = Checkpoints(tmp_path, state, keep=2, resumed=None)
    for step, value in enumerate((3.0, 1.0, 2.0, 2.5, 1.5), start=1):
        state.step = step
        state.note_best("val/rec_loss", value)
        checkpoints.save()
    assert kept_steps(tmp_path) == [5, 4, 2]
    best = best_checkpoint(tmp_path)
    assert best is not None and best.name == "step_00000002.pt"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    stems = [f"step_{step:08d}.pt" for step in (2, 4, 5)]
    assert names == sorted(["best.json", *stems, *(f"{name}.sha256" for name in stems)])


def test_what_names_the_best_is_written_again_when_it_was_lost(
    tmp_path: Path, state: TrainingState
) -> None:
    checkpoints = Checkpoints(tmp_path, state, keep=2, resumed=None)
    state.step = 1
    state.note_best("val/rec_loss", 1.0)
    checkpoints.save()
    (tmp_path / "checkpoints" / "best.json").unlink()
    state.step = 2
    checkpoints.save()
    best = best_checkpoint(tmp_path)
    assert best is not None and best.name == "step_00000001.pt"


def test_damaged_checkpoints_are_not_counted_among_those_kept(
    tmp_path: Path, state: TrainingState
) -> None:
    save_steps(tmp_path, state, range(1, 5), keep=4)
    for step in (3, 4):
        path = checkpoint_path(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-1])
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 2
    # it goes on from step 2; two that are whole are there at any time
    checkpoints = Checkpoints(tmp_path, state, keep=2, resumed=found[0])
    state.step = 5
    checkpoints.save()
    assert kept_steps(tmp_path) == [5, 2]
    for path in list_checkpoints(tmp_path):
        read_checkpoint(path)


def test_a_save_that_fails_leaves_everything_as_it_was(
    tmp_path: Path,
    state: TrainingState,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoints = Checkpoints(tmp_path, state, keep=2, resumed=None)
    state.step = 1
    checkpoints.save()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for failure in (1, 2):
        checkpoints.save()  # of the same step: its file stays with its sha256
        assert {path: path.read_bytes() for path in before} == before
        assert len(list((tmp_path / "checkpoints").iterdir())) == len(before)
        assert (
            f"step_00000001.pt cannot be written (No space left on device), failure {failure} of 3 "
            f"in a row; the run goes on, and the last checkpoint is {tmp_path}" in caplog.text
        )
    with pytest.raises(RunError, match=r"cannot be written \(No space.*make room or mend the disk"):
        checkpoints.save()


def test_failures_are_counted_in_a_row_and_the_last_save_must_not_fail(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, state, keep=2, resumed=None)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            checkpoints.save()
            checkpoints.save()
        checkpoints.save()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="the last checkpoint is .*step_00000000.pt"):
        checkpoints.save(final=True)


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, state: TrainingState) -> None:
    assert state.not_finite() is None
    assert state.average is not None
    bias, averaged = state.model.decoder.conv_out.bias, state.average.model.decoder.conv_out.bias
    assert bias is not None and averaged is not None
    for x, name in (
        (averaged, r"ema\.decoder\.conv_out\.bias"),
        (bias, r"decoder\.conv_out\.bias"),
    ):
        x.data[0] = torch.nan
        checkpoints = Checkpoints(tmp_path, state, keep=2, resumed=None)
        with pytest.raises(RunError, match=rf"step 0: {name} is not finite, and nothing is saved"):
            checkpoints.save()
        x.data[0] = 0.0
    bias.sum().backward()
    state.updater.optimizer.step()
    state.updater.optimizer.state[bias]["exp_avg"][0] = torch.inf
    with pytest.raises(RunError, match=r"0\.optimizer\.state\.\d+\.exp_avg is not finite"):
        checkpoints.save()
    assert list_checkpoints(tmp_path) == []
