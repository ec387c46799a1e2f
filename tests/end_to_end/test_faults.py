"""What becomes of `kl-vae train` when something goes wrong: real processes and real faults."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae.checkpoints.run_files import checkpoint_path, read_checkpoint
from kl_vae.cli.main import main
from kl_vae.data import StepSampler
from kl_vae.runtime.distributed import Ranks
from kl_vae.training.config import RunConfig, TrainingConfig
from kl_vae.training.setup import build_data
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


def assert_failed(run: str, running: Running, step: int, message: str) -> None:
    """It has ended with exit code 1 and with this message, as the last line and in status.json."""
    assert running.end() == 1, running.errors
    assert running.errors.splitlines()[-1] == f"kl-vae train: error: {message}"
    said = status(run)
    assert (said["state"], said["step"]) == ("failed", step)
    assert said["reason"] == f"RunError: {message}"


def limit_files(running: Running, size: int) -> None:
    """Let no file of a process grow beyond a size, which is how a full disk looks to it."""
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_disk(project: Path, caplog: Any) -> None:
    """Throughout; for a while; and at the last save."""
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

        def cannot_be_written(run: str, step: int) -> str:
            return f"{run}/checkpoints/step_{step:08d}.pt cannot be written (File too large)"

        # throughout: an error after three saves, and nothing of them is left
        run = "throughout"
        last = f"the last checkpoint is {run}/checkpoints/step_00000002.pt"
        mend = "make room or fix the disk, and run the same command again"
        message = f"{cannot_be_written(run, 8)}: {mend}; {last}"
        assert_failed(run, throughout, 8, message)
        for number, step in ((1, 4), (2, 6)):
            goes_on = f"failure {number} of 3 in a row; the run continues, and {last}"
            assert f"{cannot_be_written(run, step)}, {goes_on}\n" in throughout.errors
        assert saved_steps(run) == [2]
        assert read_checkpoint(checkpoint_path(Path(run), 2))["step"] == 2  # with its sha256

        # for a while: one line of the log, and nothing is missing
        run = "for_a_while"
        assert for_a_while.end() == 0, for_a_while.errors
        assert f"{cannot_be_written(run, 4)}, failure 1 of 3 in a row" in for_a_while.errors
        assert "failure 2" not in for_a_while.errors
        waits = "for_a_while/metrics.jsonl cannot be written (File too large); its lines wait for"
        assert waits in for_a_while.errors
        assert "TensorBoard's events cannot be written, and end here" in for_a_while.errors
        assert [line["step"] for line in lines_meanwhile] == [1, 2]
        assert without_speed(metrics(run)) == without_speed(metrics("whole"))
        assert saved_steps(run) == [8, 10]
        assert_same(checkpoint(run, 10), whole)
        assert status(run)["state"] == "finished"

        # at the last save: an error at once
        run = "at_the_last"
        last = f"the last checkpoint is {run}/checkpoints/step_00000008.pt"
        assert_failed(run, at_the_last, 10, f"{cannot_be_written(run, 10)}: {mend}; {last}")
        assert saved_steps(run) == [6, 8]

    # where there is room again the same command goes on
    for run in ("throughout", "at_the_last"):
        caplog.clear()
        assert main(["train", "tiny.yaml", *arguments, run]) == 0
        assert f"the last part of this run failed: RunError: {run}/checkpoints/" in caplog.text
        assert_same(checkpoint(run, 10), whole)
        assert without_speed(metrics(run)) == without_speed(metrics("whole"))


@pytest.mark.slow
def test_signals_during_validation(project: Path, make_images: Callable[..., Path]) -> None:
    """The run ends before the validation does, and the same command does that anew."""
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
            running.wait_for(f"{name}: stopping after this step; once more ends at once, unsaved\n")
            assert children(running.pid) == workers
            gate.unlink()
        for name, running in all_running.items():
            assert running.end() == 0, running.errors
            saved = f"stopped by {name} at step 3 of 6, saved in {name}; the same command resumes"
            assert running.errors.splitlines()[-1] == saved
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
        running.wait_for("SIGTERM: stopping after this step")
        running.send(signal.SIGTERM)
        assert running.end() == -signal.SIGTERM
    assert status("runs/tiny")["state"] == "running"  # it had no time to say more
    assert not Path("runs/tiny/checkpoints").exists()


@pytest.mark.slow
def test_a_data_worker_that_is_killed_or_hangs(
    project: Path, make_images: Callable[..., Path]
) -> None:
    """An error that says what to look at, at once or after the time-out."""
    command = [*TRAIN, "data.num_workers=2", "training.max_steps=100000"]
    command += ["training.validate_every_steps=100000"]
    with ExitStack() as stack:
        killed = stack.enter_context(Running(*command, "--run-dir", "killed"))
        slow = make_images(project / "slow", 24)
        # who opens one of these waits, as for a server that does not answer
        before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # tells that somebody waits
        stack.callback(signal.signal, signal.SIGIO, before)
        for path in slow.iterdir():
            file = stack.enter_context(path.open("r+b"))
            try:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError:
                pytest.skip("the file system of the temporary folder has no leases")
        hangs = [*command, "data.train.root=slow", "training.timeout_seconds=2"]
        hanging = stack.enter_context(Running(*hangs, "--run-dir", "hanging"))

        killed.wait_until(lambda: len(metrics("killed")) > 1)
        victim, other = children(killed.pid)
        os.kill(victim, signal.SIGKILL)
        assert killed.end() == 1
        line = killed.errors.splitlines()[-1]
        # by its process, or by the connection on which it was handing over a batch
        assert line.startswith("kl-vae train: error: a data worker ended (")
        assert str(victim) in line or "Connection" in line or "EOFError" in line
        assert "/dev/shm" in line and "lower data.num_workers" in line
        said = status("killed")
        assert (said["state"], said["reason"]) == ("failed", f"RunError: {line[21:]}")
        assert not is_alive(other)

        message = (
            "the data workers returned no batch within training.timeout_seconds (DataLoader timed "
            "out after 2 seconds): check the storage of data.train.root, or raise "
            "training.timeout_seconds"
        )
        assert_failed("hanging", hanging, 0, message)


@pytest.mark.slow
def test_numbers_that_are_not_finite(project: Path) -> None:
    """Steps are left out, but not for ever; parameters are not saved."""
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
        for step, count in ((2, 1), (3, 2)):
            assert (
                f"step {step + 1} is skipped: the loss on rank 0 is not finite ({count} so far, "
                f"{count} in a row); its images:\n  rank 0: {images_of_step(step)}\n"
            ) in twice.errors
        assert twice.errors.count("is skipped") == 2
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

        message = (
            "3 steps in a row had no finite loss or gradient: lower the learning rates, set "
            "training.precision to bf16 or fp32, or look at the images named above; "
            "training.max_skipped_steps is the limit"
        )
        assert_failed("always", always, 2, message)
        assert always.errors.count("is skipped") == 3

        message = (
            "step 4: loss.idle is not finite, and nothing is saved of it: lower the learning "
            "rates; the last checkpoint is spoilt/checkpoints/step_00000003.pt"
        )
        assert_failed("spoilt", spoilt, 4, message)
        assert saved_steps("spoilt") == [1, 2, 3]

    assert main(["train", "tiny.yaml", *arguments, "whole"]) == 0
    assert main(["train", "tiny.yaml", *arguments, "spoilt"]) == 0
    assert_same(checkpoint("spoilt", 6), checkpoint("whole", 6))


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
        assert errors == (
            "kl-vae train: error: run: another process trains in it; wait until it ends, or choose "
            "another --run-dir\n"
        )
        assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
        gate.unlink()
        running.wait_at_gate()  # it goes on
        (worker,) = children(running.pid)
        running.send(signal.SIGKILL)
        assert running.end() == -signal.SIGKILL
        assert (status("run")["state"], status("run")["step"]) == ("running", 4)

        caplog.set_level("INFO")
        assert main(["train", "tiny.yaml", *arguments]) == 0
        assert "the last part of this run ended without a message after step 4 (20" in caplog.text
        assert "): killed, or its machine was lost" in caplog.text
        assert "6 steps, 4 of them taken" in caplog.text
        assert (
            main(["train", "tiny.yaml", *arguments[:-4], "--run-dir", "whole", *arguments[-2:]])
            == 0
        )
        assert_same(checkpoint("run", 6), checkpoint("whole", 6))
        deadline = time.monotonic() + 60
        while is_alive(worker):  # it looks every five seconds whether its parent is there
            assert time.monotonic() < deadline
            time.sleep(0.05)
