"""Faults during `kl-vae train`, tested with real processes."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from kl_vae.checkpoints.run_files import checkpoint_path, read_checkpoint
from kl_vae.cli.main import main
from kl_vae.data import StepSampler
from kl_vae.runtime.distributed import Ranks
from kl_vae.training.config import RunConfig, TrainingConfig
from kl_vae.training.setup import build_data
from tests.messages import is_about
from tests.processes import (
    TRAIN,
    Running,
    assert_same,
    checkpoint,
    children,
    faulty_loss,
    is_alive,
    metrics,
    run_to_its_end,
    saved_steps,
    status,
    without_speed,
)

STOPPING = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]


def assert_failed(run: str, running: Running, step: int, *parts: object) -> None:
    """The run ended with exit code 1; its last line and status.json have the same message."""
    assert running.end() == 1, running.errors
    last_line = running.errors.splitlines()[-1]
    assert last_line.startswith("kl-vae train: error: ")
    message = last_line.removeprefix("kl-vae train: error: ")
    assert is_about(message, *parts), message
    said = status(run)
    assert (said["state"], said["step"]) == ("failed", step)
    assert said["reason"] == f"RunError: {message}"


def limit_files(running: Running, size: int) -> None:
    """Limit the size of the files of a process, to simulate a full disk."""
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_disk(project: Path, caplog: Any) -> None:
    """The disk is full throughout, for a while, and at the last save."""
    arguments = [*faulty_loss(project), "training.save_every_steps=2"]
    arguments += ["training.validate_every_steps=100", "training.max_steps=10", "--run-dir"]

    def start(run: str, faults: str) -> Running:
        return stack.enter_context(Running(*TRAIN, *arguments, run, FAULTS=faults))

    with ExitStack() as stack:
        throughout = start("throughout", "wait@train:2")
        for_a_while = start("for_a_while", "wait@train:2 wait@train:4")
        at_the_last = start("at_the_last", "wait@train:8")

        gate = throughout.wait_at_gate()
        less = checkpoint_path(Path("throughout"), 2).stat().st_size // 2
        limit_files(throughout, less)
        gate.unlink()

        gate = for_a_while.wait_at_gate()
        # not even the next line of metrics.jsonl
        limit_files(for_a_while, Path("for_a_while/metrics.jsonl").stat().st_size + 100)
        gate.unlink()
        gate = for_a_while.wait_at_gate()
        lines_meanwhile = metrics("for_a_while")
        limit_files(for_a_while, resource.RLIM_INFINITY)
        gate.unlink()

        gate = at_the_last.wait_at_gate()
        limit_files(at_the_last, less)
        gate.unlink()

        assert main(["train", "tiny.yaml", *arguments, "whole"]) == 0
        whole = checkpoint("whole", 10)

        def failed_save(run: str, step: int) -> tuple[str, str]:
            return f"{run}/checkpoints/step_{step:08d}.pt", "File too large"

        # throughout: an error after three saves, which leave no files
        run = "throughout"
        last = f"{run}/checkpoints/step_00000002.pt"
        assert_failed(run, throughout, 8, *failed_save(run, 8), last)
        lines = throughout.errors.splitlines()
        for number, step in ((1, 4), (2, 6)):
            assert any(is_about(x, *failed_save(run, step), number, 3, last) for x in lines)
        assert saved_steps(run) == [2]
        assert read_checkpoint(checkpoint_path(Path(run), 2))["step"] == 2  # with its sha256

        # for a while: one line of the log, and nothing is missing
        run = "for_a_while"
        assert for_a_while.end() == 0, for_a_while.errors
        failures = [line for line in for_a_while.errors.splitlines() if "File too large" in line]
        (failed,) = [line for line in failures if "/checkpoints/" in line]
        assert is_about(failed, *failed_save(run, 4), 1, 3)
        assert any(is_about(line, "for_a_while/metrics.jsonl") for line in failures)
        assert is_about(for_a_while.errors, "TensorBoard")
        assert [line["step"] for line in lines_meanwhile] == [1, 2]
        assert without_speed(metrics(run)) == without_speed(metrics("whole"))
        assert saved_steps(run) == [8, 10]
        assert_same(checkpoint(run, 10), whole)
        assert status(run)["state"] == "finished"

        # at the last save: an error at once
        run = "at_the_last"
        last = f"{run}/checkpoints/step_00000008.pt"
        assert_failed(run, at_the_last, 10, *failed_save(run, 10), last)
        assert saved_steps(run) == [6, 8]

    # the same command resumes once the disk has space
    for run in ("throughout", "at_the_last"):
        caplog.clear()
        assert main(["train", "tiny.yaml", *arguments, run]) == 0
        assert any(is_about(text, f"RunError: {run}/checkpoints/") for text in caplog.messages)
        assert_same(checkpoint(run, 10), whole)
        assert without_speed(metrics(run)) == without_speed(metrics("whole"))


@pytest.mark.slow
def test_signals_during_validation(project: Path, make_images: Callable[..., Path]) -> None:
    """The run ends before the validation does, which the same command repeats."""
    make_images(project / "images", 40)  # two batches and more for validation
    arguments = [*faulty_loss(project), "data.validation.fraction=0.5", "data.num_workers=1"]
    arguments += ["training.validate_every_steps=3", "--run-dir"]
    with ExitStack() as stack:
        all_running = {
            name: stack.enter_context(Running(*TRAIN, *arguments, name, FAULTS="wait@val:3"))
            for name in STOPPING
        }
        for name, running in all_running.items():
            gate = running.wait_at_gate()
            workers = children(running.pid)
            assert len(workers) == 2  # of training and of validation
            running.send_all(signal.Signals[name])
            running.wait_for(f"{name}: ")
            assert children(running.pid) == workers
            gate.unlink()
        for name, running in all_running.items():
            assert running.end() == 0, running.errors
            assert is_about(running.errors.splitlines()[-1], name, "step 3", 6)
            said = status(name)
            assert (said["state"], said["reason"], said["step"]) == ("stopped", name, 3)
            assert saved_steps(name) == [3]
            assert [line["step"] for line in metrics(name)] == [1, 2, 3]  # without validation
            assert all("val/psnr" not in line for line in metrics(name))

    assert main(["train", "tiny.yaml", *arguments, "whole"]) == 0
    for name in STOPPING:
        assert main(["train", "tiny.yaml", *arguments, name]) == 0
        assert status(name)["state"] == "finished"
        assert_same(checkpoint(name, 6), checkpoint("whole", 6))
        assert without_speed(metrics(name)) == without_speed(metrics("whole"))


def test_a_second_sigterm_ends_at_once(project: Path) -> None:
    command = [*TRAIN, *faulty_loss(project), "training.validate_every_steps=100"]
    with Running(*command, FAULTS="wait@train:2") as running:
        running.wait_at_gate()
        running.send(signal.SIGTERM)
        running.wait_for("SIGTERM: ")
        running.send(signal.SIGTERM)
        assert running.end() == -signal.SIGTERM
    assert status("runs/tiny")["state"] == "running"  # not updated
    assert not Path("runs/tiny/checkpoints").exists()


def take_lease(file: BinaryIO) -> None:
    """Take a write lease of a file, as soon as no other process has it open."""
    while True:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            return
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:
            pytest.skip("the file system of the temporary folder has no leases")


@pytest.mark.slow
def test_a_data_worker_that_is_killed_or_hangs(
    project: Path, make_images: Callable[..., Path]
) -> None:
    """An error that names the cause, at once or after the timeout."""
    command = [*TRAIN, "data.num_workers=2", "training.max_steps=100000"]
    command += ["training.validate_every_steps=100000"]
    with ExitStack() as stack:
        killed = stack.enter_context(Running(*command, "--run-dir", "killed"))
        slow = make_images(project / "slow", 24)
        hangs = [*command, "data.train.root=slow", "training.timeout_seconds=2"]
        hanging = stack.enter_context(Running(*hangs, "--run-dir", "hanging"))
        hanging.wait_until(lambda: len(metrics("hanging")) > 1)
        # opening one of these files blocks, as on a server that does not respond
        before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent when a process opens a file
        stack.callback(signal.signal, signal.SIGIO, before)
        for path in slow.iterdir():
            take_lease(stack.enter_context(path.open("r+b")))

        killed.wait_until(lambda: len(metrics("killed")) > 1)
        victim, other = children(killed.pid)
        os.kill(victim, signal.SIGKILL)
        assert killed.end() == 1
        line = killed.errors.splitlines()[-1]
        # by its process, or by the connection on which it was handing over a batch
        assert line.startswith("kl-vae train: error: ")
        assert str(victim) in line or "Connection" in line or "EOFError" in line
        assert is_about(line, "worker", "/dev/shm", "data.num_workers")
        said = status("killed")
        assert (said["state"], said["reason"]) == ("failed", f"RunError: {line[21:]}")
        assert not is_alive(other)

        timeout = "DataLoader timed out after 2 seconds"
        keys = ("training.timeout_seconds", "data.train.root")
        assert hanging.end() == 1
        assert_failed("hanging", hanging, status("hanging")["step"], timeout, *keys)


@pytest.mark.slow
def test_numbers_that_are_not_finite(project: Path) -> None:
    """A limited number of steps is skipped; NaN parameters are not saved."""
    assert TrainingConfig(max_steps=1).max_skipped_steps == 10
    arguments = [*faulty_loss(project), "training.save_every_steps=1"]
    arguments += ["training.keep_checkpoints=20", "training.max_skipped_steps=3"]
    arguments += ["training.validate_every_steps=100", "--run-dir"]
    with ExitStack() as stack:
        twice, always, spoilt = (
            stack.enter_context(Running(*TRAIN, *arguments, run, FAULTS=faults))
            for run, faults in (
                ("twice", "nan@train:2 nan@train:3"),
                ("always", "nan@train:*"),
                ("spoilt", "spoil@train:3"),
            )
        )
        assert twice.end() == 0, twice.errors
        assert len(skipped_steps(twice)) == 2
        for (skipped, names), step, count in zip(skipped_steps(twice), (2, 3), (1, 2), strict=True):
            assert is_about(skipped, f"step {step + 1}", "loss", "rank 0", count)
            assert is_about(names, f"rank 0: {images_of_step(step)}")
        steps = [line for line in metrics("twice") if "train/psnr" in line]
        assert [line["skipped_steps"] for line in steps] == [0, 0, 1, 2, 2, 2]
        losses = [line["train/total_loss"] for line in steps]
        assert [i for i, loss in enumerate(losses) if loss == "nan"] == [2, 3]
        before = checkpoint("twice", 2)
        for step in (3, 4):
            after = checkpoint("twice", step)
            assert_same(before["model"], after["model"])
            assert_same(before["updaters"], after["updaters"])
        assert saved_steps("twice") == [1, 2, 3, 4, 5, 6]

        keys = ("training.precision", "bf16", "training.max_skipped_steps")
        assert_failed("always", always, 2, 3, *keys)
        assert len(skipped_steps(always)) == 3

        last = "spoilt/checkpoints/step_00000003.pt"
        assert_failed("spoilt", spoilt, 4, "step 4", "loss.idle", last)
        assert saved_steps("spoilt") == [1, 2, 3]

    assert main(["train", "tiny.yaml", *arguments, "whole"]) == 0
    assert main(["train", "tiny.yaml", *arguments, "spoilt"]) == 0
    assert_same(checkpoint("spoilt", 6), checkpoint("whole", 6))


def skipped_steps(running: Running) -> list[tuple[str, str]]:
    """The log lines of each skipped step: the step and its cause, then its images."""
    lines = running.errors.splitlines()
    pairs = zip(lines, lines[1:], strict=False)
    return [(line, images) for line, images in pairs if images.startswith("  rank 0: ")]


def images_of_step(step: int) -> str:
    """The files of a step, in the order in which they are named."""
    train_set, _ = build_data(RunConfig.load("tiny.yaml"), Ranks(0, 1, torch.device("cpu")))
    (keys,) = StepSampler(len(train_set), 8, 8, 0, 1, 0, start_step=step, total_steps=step + 1)
    return ", ".join(train_set.source.name(index) for _, index, _ in keys)


@pytest.mark.slow
def test_another_process_in_the_run_and_an_end_without_a_message(
    project: Path, caplog: Any
) -> None:
    arguments = [*faulty_loss(project), "training.save_every_steps=2", "--run-dir", "run"]
    arguments += ["training.validate_every_steps=100", "data.num_workers=1"]
    with Running(*TRAIN, *arguments, FAULTS="wait@train:3 wait@train:5") as running:
        gate = running.wait_at_gate()
        before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
        code, errors = run_to_its_end(*TRAIN, *arguments)
        assert code == 2
        (line,) = errors.splitlines()
        assert line.startswith("kl-vae train: error: ")
        assert is_about(line, "run", "process", "--run-dir")
        assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
        gate.unlink()
        running.wait_at_gate()  # it is still running
        (worker,) = children(running.pid)
        running.send(signal.SIGKILL)
        assert running.end() == -signal.SIGKILL
        assert (status("run")["state"], status("run")["step"]) == ("running", 4)

        caplog.set_level("INFO")
        assert main(["train", "tiny.yaml", *arguments]) == 0
        assert any(is_about(text, "step 4", "killed") for text in caplog.messages)
        assert any(is_about(text, "6 steps", 4) for text in caplog.messages)
        assert (
            main(["train", "tiny.yaml", *arguments[:-4], "--run-dir", "whole", *arguments[-2:]])
            == 0
        )
        assert_same(checkpoint("run", 6), checkpoint("whole", 6))
        deadline = time.monotonic() + 60
        while is_alive(worker):  # it checks every five seconds whether its parent is alive
            assert time.monotonic() < deadline
            time.sleep(0.05)
