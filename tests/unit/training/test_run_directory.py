"""A run directory: its config, its lock, its status, and its checkpoints."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.run_files import (
    best_checkpoint,
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    read_metrics,
    read_status,
)
from kl_vae.optim.config import OptimizerConfig
from kl_vae.runtime.config_file import MAX_BYTES
from kl_vae.runtime.errors import RunError
from kl_vae.training.config import RunConfig
from kl_vae.training.ema import WeightAverage
from kl_vae.training.run_directory import HARMLESS, RunDirectory
from kl_vae.training.state import Network, TrainingState
from tests.messages import is_about, mentions


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def state(tiny_ddconfig: dict[str, object]) -> TrainingState:
    model = AutoEncoderKL(tiny_ddconfig, 4, monitor="val/rec_loss")
    network = Network.build(model.own_parameters(), OptimizerConfig(name="adam"), "fp32")
    return TrainingState(model, network, {}, "", average=WeightAverage(model, 0.9))


CONFIG: dict[str, Any] = {"optimizer": {"betas": (0.9, 0.99)}, "training": {"max_steps": 5}}


def test_a_new_or_empty_directory_holds_no_run(tmp_path: Path) -> None:
    assert not RunDirectory(tmp_path / "new").check(CONFIG)
    assert not RunDirectory(tmp_path).check(CONFIG)
    assert not (tmp_path / "new").exists()


def test_a_run_of_the_same_config_is_resumed(run: Path, state: TrainingState) -> None:
    RunDirectory(run).prepare(CONFIG, None, state)
    assert RunDirectory(run).check(CONFIG) == {}


def test_the_length_may_change_and_is_named(
    run: Path, state: TrainingState, caplog: pytest.LogCaptureFixture
) -> None:
    RunDirectory(run).prepare(CONFIG, None, state)
    caplog.set_level("INFO")
    assert RunDirectory(run).check({**CONFIG, "training": {"max_steps": 9}})
    (message,) = caplog.messages
    assert is_about(message, "training.max_steps", 5, 9)


def test_the_directory_of_a_killed_start_can_be_reused(run: Path) -> None:
    for name in (".lock", ".123.tmp"):
        (run / name).touch()
    assert not RunDirectory(run).check(CONFIG)
    (run / "notes.txt").touch()
    with pytest.raises(ValueError, match=mentions(run, "--run-dir")):
        RunDirectory(run).check(CONFIG)


def test_temporary_files_of_killed_saves_are_removed(run: Path, state: TrainingState) -> None:
    others = [run / ".hidden.tmp", run / "checkpoints" / "5.tmp", run / "samples" / "a.png"]
    for path in (run / ".1.tmp", run / "checkpoints" / ".22.tmp", run / "samples" / ".333.tmp"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in others:
        path.touch()
    RunDirectory(run).prepare(CONFIG, None, state)
    left = {path for path in run.rglob("*") if path.is_file()}
    assert left == {*others, run / "config.yaml", run / "history.jsonl"}


def test_a_config_that_is_too_large_is_refused(run: Path) -> None:
    (run / "config.yaml").write_text("#" * (1 << 20) + "\na: 1\n")
    with pytest.raises(ValueError, match=mentions("config.yaml", MAX_BYTES)):
        RunDirectory(run).check(CONFIG)


def test_a_failure_of_the_previous_process_is_logged(
    run: Path, state: TrainingState, caplog: pytest.LogCaptureFixture
) -> None:
    directory = RunDirectory(run)

    def messages() -> list[str]:
        caplog.clear()
        directory.prepare(CONFIG, None, state)
        return caplog.messages

    assert messages() == []
    directory.write_status("finished", 5, 5)
    assert messages() == []
    directory.write_status("stopped", 5, 9, reason="SIGTERM")
    assert messages() == []
    directory.write_status("running", 7, 9)
    (message,) = messages()
    assert is_about(message, "step 7")
    directory.write_status("failed", 7, 9, reason="RunError: rank 1 failed: boom")
    (message,) = messages()
    assert is_about(message, "RunError: rank 1 failed: boom")
    for text in ("{", "5", "[" * 100_000):
        (run / "status.json").write_text(text)
        assert messages() == []


def test_a_status_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RunDirectory(tmp_path / "gone").write_status("running", 1, 2)
    assert is_about(caplog.text, "gone/status.json", "No such file or directory")


def test_every_harmless_key_is_a_key_of_the_config() -> None:
    config = dataclasses.asdict(RunConfig.load("example"))
    for key in HARMLESS:
        section = config
        for name in key.split("."):
            assert name in section
            section = section[name]


def test_all_that_changed_is_named_at_once(run: Path, state: TrainingState) -> None:
    RunDirectory(run).prepare(CONFIG, None, state)
    other = {"optimizer": {"betas": (0.5, 0.9)}, "training": {"max_steps": 5, "seed": 1}}
    betas = ("optimizer.betas", "[0.9, 0.99]", "[0.5, 0.9]")
    error = mentions(*betas, "training.seed", "None", 1, "--run-dir")
    with pytest.raises(ValueError, match=error) as caught:
        RunDirectory(run).check(other)
    assert "\n" not in str(caught.value)


HOLD = """
import sys, time
from pathlib import Path
from kl_vae.training.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])) as run:
    run.lock()
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_cannot_lock_the_directory(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    first = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with RunDirectory(run) as directory:
        with pytest.raises(ValueError, match=mentions("runs/a", "process", "--run-dir")):
            directory.lock()
        first.kill()  # without releasing the lock
        first.communicate()
    with RunDirectory(run) as directory:
        directory.lock()


def test_nothing_is_created_before_it_is_locked(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        RunDirectory(tmp_path / "file" / "run") as directory,
        pytest.raises(ValueError, match=mentions("file/run", "--run-dir")),
    ):
        directory.lock()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with RunDirectory(tmp_path / "run") as directory:
        directory.lock()


def save_steps(run: Path, state: TrainingState, steps: Iterator[int] | range, keep: int) -> None:
    directory = RunDirectory(run)
    for state.step in steps:
        directory.save(state, keep)


def kept_steps(run: Path) -> list[int]:
    return [int(path.stem.removeprefix("step_")) for path in list_checkpoints(run)]


def test_the_newest_and_the_best_are_kept(tmp_path: Path, state: TrainingState) -> None:
    """Each checkpoint is saved before its validation, which may make another one obsolete."""
    directory = RunDirectory(tmp_path)
    kept = []
    for step, value in enumerate((3.0, 1.0, 2.0, 2.5, 1.5, 0.5), start=1):
        state.step = step
        directory.save(state, keep=2)
        state.note_validation(value)
        directory.write_best(state, keep=2)
        kept.append(kept_steps(tmp_path))
        best = best_checkpoint(tmp_path)
        assert best is not None and best.name == f"step_{state.best['step']:08d}.pt"
    assert kept == [[1], [2, 1], [3, 2], [4, 3, 2], [5, 4, 2], [6, 5]]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    stems = [f"step_{step:08d}.pt" for step in (5, 6)]
    assert names == sorted(["best.json", *stems, *(f"{name}.sha256" for name in stems)])


def test_a_missing_best_json_is_written_again(tmp_path: Path, state: TrainingState) -> None:
    directory = RunDirectory(tmp_path)
    state.step = 1
    directory.save(state, keep=2)
    state.note_validation(1.0)  # and killed before best.json was written
    RunDirectory(tmp_path).prepare(CONFIG, checkpoint_path(tmp_path, 1), state)
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
    # resumes from step 2; two intact checkpoints are kept at any time
    directory = RunDirectory(tmp_path)
    directory.prepare(CONFIG, found[0], state)
    state.step = 5
    directory.save(state, keep=2)
    assert kept_steps(tmp_path) == [5, 2]
    for path in list_checkpoints(tmp_path):
        read_checkpoint(path)


def test_a_failed_save_changes_no_file(
    tmp_path: Path,
    state: TrainingState,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = RunDirectory(tmp_path)
    state.step = 1
    directory.save(state, keep=2)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for failure in (1, 2):
        directory.save(state, keep=2)  # of the same step: its file stays with its sha256
        assert {path: path.read_bytes() for path in before} == before
        assert len(list((tmp_path / "checkpoints").iterdir())) == len(before)
        message = caplog.messages[-1]
        assert len(caplog.messages) == failure
        assert is_about(message, "step_00000001.pt", "No space left on device", failure, 3)
    with pytest.raises(RunError, match=mentions("step_00000001.pt", "No space left on device")):
        directory.save(state, keep=2)


def test_failures_are_counted_in_a_row_and_the_last_save_must_not_fail(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            directory.save(state, keep=2)
            directory.save(state, keep=2)
        directory.save(state, keep=2)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=mentions("step_00000000.pt", "No space left on device")):
        directory.save(state, keep=2, final=True)


def test_a_state_with_nan_is_not_saved(tmp_path: Path, state: TrainingState) -> None:
    assert state.not_finite() is None
    assert state.average is not None
    bias, averaged = state.model.decoder.conv_out.bias, state.average.model.decoder.conv_out.bias
    assert bias is not None and averaged is not None
    for x, name in (
        (averaged, "ema.decoder.conv_out.bias"),
        (bias, "decoder.conv_out.bias"),
    ):
        x.data[0] = torch.nan
        directory = RunDirectory(tmp_path)
        with pytest.raises(RunError, match=mentions("step 0", name)):
            directory.save(state, keep=2)
        x.data[0] = 0.0
    bias.sum().backward()
    state.autoencoder.optimizer.step()
    state.autoencoder.optimizer.state[bias]["exp_avg"][0] = torch.inf
    with pytest.raises(RunError, match=r"step 0.*\b0\.optimizer\.state\.\d+\.exp_avg\b"):
        directory.save(state, keep=2)
    assert list_checkpoints(tmp_path) == []


def test_the_directory_of_another_run_is_not_written(tmp_path: Path, state: TrainingState) -> None:
    """`rm -rf` and a new start in the same place, while the first process is alive."""
    path = tmp_path / "run"
    with RunDirectory(path) as first:
        first.lock()
        state.step = 1
        first.save(state, keep=2)
        shutil.rmtree(path)
        with pytest.raises(RunError, match=mentions(path, "removed", "another run")):
            first.save(state, keep=2)
        assert not path.exists()
        with RunDirectory(path) as second:
            second.lock()
            second.write_status("running", 0, 9)
            state.step = 2
            with pytest.raises(RunError, match=mentions(path, "another run")):
                first.save(state, keep=2)
            first.write_status("failed", 2, 9)
            assert read_status(path)["state"] == "running"
            assert not kept_steps(path)


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, state: TrainingState, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = checkpoint_path(tmp_path, 1)
    stuck.mkdir(parents=True)  # a folder in its place
    save_steps(tmp_path, state, range(2, 5), keep=2)
    assert kept_steps(tmp_path) == [4, 3, 1]
    assert is_about(caplog.text, stuck, "removed")


def test_damaged_lines_of_metrics_are_skipped(tmp_path: Path) -> None:
    lines = [b'{"step": 1}', b"\xff\xfe", b"[" * 100_000, b'{"step": 2, "x": "\xff"}', b"", b"{"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("content", ["- a list", "data: null", "text"])
def test_a_damaged_config_is_named(run: Path, content: str) -> None:
    (run / "config.yaml").write_text(content)
    for call in (lambda: RunDirectory(run).check(CONFIG), RunDirectory(run).pixel_range):
        with pytest.raises(ValueError, match=mentions(run / "config.yaml", "--run-dir")):
            call()


def test_a_change_is_printable_and_short(run: Path, state: TrainingState) -> None:
    RunDirectory(run).prepare({**CONFIG, "a\x1b[31m": "b" * 10_000}, None, state)
    with pytest.raises(ValueError, match=mentions(run, "a\\x1b[31m")) as caught:
        RunDirectory(run).check(CONFIG)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
