"""Faults of one process of a distributed run."""

from __future__ import annotations

import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from kl_vae.cli.main import main
from kl_vae.data import StepSampler
from kl_vae.runtime.distributed import RankMonitor, Ranks
from kl_vae.training.config import RunConfig
from kl_vae.training.setup import build_data
from tests.messages import is_about
from tests.processes import (
    SCRIPT,
    TORCHRUN,
    Running,
    assert_same,
    checkpoint,
    children,
    faulty_loss,
    gate_of,
    metrics,
    pid_of_rank,
    ranks_by_hand,
    saved_steps,
    status,
)

TWO = (*TORCHRUN, "--nproc-per-node=2")
LONG = ("training.max_steps=100000", "training.validate_every_steps=100000")
LOST = ("rank 1", "memory", "dmesg")


def last_error(running: Running) -> str:
    """The error message of a rank."""
    errors = [line for line in running.errors.splitlines() if line.startswith("kl-vae train")]
    assert errors, running.errors
    return errors[-1]


def assert_first_rank_failed(running: Running, run: str, *parts: object) -> None:
    """Rank 0, or torchrun, ended with this error, which is also in status.json."""
    error = last_error(running)
    assert error.startswith("kl-vae train: error: ") and is_about(error, *parts), error
    assert status(run)["state"] == "failed"
    reason = status(run)["reason"]
    assert reason.startswith("RunError: ") and is_about(reason, *parts), reason


@pytest.mark.slow
def test_a_rank_that_is_lost_ends_the_others_with_an_error_that_names_it(project: Path) -> None:
    scenarios = (killed_under_torchrun, killed, stopped, store_stopped, restarted)
    faulty_loss(project)
    with ThreadPoolExecutor(len(scenarios)) as pool:  # most of the time they wait
        for scenario in [pool.submit(scenario) for scenario in scenarios]:
            scenario.result()
    # the restarted run has learned what that one has whose rank was killed later
    one, other = checkpoint("restarted", 6), checkpoint("killed", 6)
    for key in ("model", "updaters", "images_seen"):
        assert_same(one[key], other[key])


def killed_under_torchrun() -> None:
    command = (*TWO, SCRIPT, "tiny.yaml", *LONG, "data.num_workers=1", "--run-dir", "torchrun")
    with Running(*command) as torchrun:
        torchrun.wait_until(lambda: metrics("torchrun"))
        os.kill(pid_of_rank(torchrun, 1), signal.SIGKILL)
        assert torchrun.end() == 1
        assert_first_rank_failed(torchrun, "torchrun", *LOST)


def killed() -> None:
    """Without torchrun, after 6 steps."""
    arguments = (*faulty_loss(Path()), *LONG, "training.save_every_steps=2")
    first, second = ranks_by_hand(*arguments, "--run-dir", "killed", FAULTS="wait@train:6:1")
    with first, second:
        second.wait_at_gate()
        assert saved_steps("killed") == [4, 6]
        second.send(signal.SIGKILL)
        assert first.end() == 1
        assert_first_rank_failed(first, "killed", *LOST)


def stopped() -> None:
    arguments = (*LONG, "training.timeout_seconds=10")
    first, second = ranks_by_hand(*arguments, "--run-dir", "stopped")
    with first, second:
        first.wait_until(lambda: metrics("stopped"))
        second.send(signal.SIGSTOP)
        assert first.end() == 1
        assert_first_rank_failed(first, "stopped", *LOST)
        assert "Timed out waiting 10000ms" in last_error(first)


def store_stopped() -> None:
    """The machine hangs that holds the store by which the ranks ask for one another."""
    serve = """
import sys, time, torch.distributed
store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, file=sys.stderr)
time.sleep(300)
"""
    with Running(sys.executable, "-c", serve) as machine:
        machine.wait_until(lambda: machine.errors.endswith("\n"))
        store = TCPStore("127.0.0.1", int(machine.errors), is_master=False)
        machine.send(signal.SIGSTOP)
        lost = RankMonitor(store, rank=1, world_size=3).find_lost_rank()
        assert is_about(lost, "ranks 0, 2", "dmesg")


def restarted() -> None:
    """Restarted by torchrun, the run resumes from its last checkpoint and finishes."""
    arguments = (*faulty_loss(Path()), "training.save_every_steps=2")
    arguments += ("training.validate_every_steps=100", "--run-dir", "restarted")
    command = (*TWO, "--max-restarts=1", SCRIPT, "tiny.yaml", *arguments)
    with Running(*command, FAULTS="wait@train:3:1") as torchrun:

        def at_gate() -> list[int]:
            return [pid for pid in children(torchrun.pid) if gate_of(pid).exists()]

        torchrun.wait_until(at_gate)
        (victim,) = at_gate()
        assert saved_steps("restarted") == [2]
        os.kill(victim, signal.SIGKILL)
        torchrun.wait_until(lambda: at_gate() not in ([], [victim]))
        (successor,) = at_gate()
        gate_of(successor).unlink()
        assert torchrun.end() == 0, torchrun.errors
        lines = torchrun.errors.splitlines()
        assert any(is_about(line, "RunError", *LOST) for line in lines)
        assert any(is_about(line, "6 steps", 2) for line in lines)
        assert status("restarted")["state"] == "finished"
        steps = [line["step"] for line in metrics("restarted") if "train/psnr" in line]
        assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error; and a loss that is not finite, and later parameters that differ."""
    arguments = [*faulty_loss(project), "training.save_every_steps=1"]
    arguments += ["training.validate_every_steps=100", "training.check_ranks_every_steps=1"]
    arguments += ["training.keep_checkpoints=10", "--run-dir"]
    with ExitStack() as stack:
        boom, other = map(
            stack.enter_context, ranks_by_hand(*arguments, "boom", FAULTS="boom@train:2:1")
        )
        faults = "nan@train:2:1 drift@train:4:1"
        first, second = map(stack.enter_context, ranks_by_hand(*arguments, "run", FAULTS=faults))

        # an error of its own
        assert (boom.end(), other.end()) == (1, 1), boom.errors
        assert "RuntimeError: boom" in other.errors
        assert_first_rank_failed(boom, "boom", "rank 1", "boom")
        assert saved_steps("boom") == [1, 2]

        # a NaN loss: both ranks skip the step and continue
        assert (first.end(), second.end()) == (1, 1), first.errors
        lines = first.errors.splitlines()
        position = lines.index(f"  rank 1: {images_of_step(2, rank=1)}")
        assert is_about(lines[position - 1], "step 3", "loss", "rank 1", 1)
        assert "rank 0: " not in first.errors
        assert_same(checkpoint("run", 2)["model"], checkpoint("run", 3)["model"])
        assert [line["skipped_steps"] for line in metrics("run")] == [0, 0, 1, 1]

        # parameters that differ: nothing is saved of them
        number = len(checkpoint("run", 4)["model"])
        assert_first_rank_failed(first, "run", "step 5", 1, number, "loss.idle", "rank 1")
        reason = last_error(first).removeprefix("kl-vae train: error: ")
        assert last_error(second) == f"kl-vae train [rank 1]: error: {reason}"
        assert saved_steps("run") == [1, 2, 3, 4]

    # the same command, and the same as where one process leaves the step out
    assert main(["train", "tiny.yaml", *arguments, "run"]) == 0
    monkeypatch.setenv("FAULTS", "nan@train:2")
    assert main(["train", "tiny.yaml", *arguments, "one"]) == 0
    one, run = checkpoint("one", 6), checkpoint("run", 6)
    assert one["skips"] == run["skips"] == {"total": 1, "in_a_row": 0, "by_scaler": 0}
    one, run = one["model"], run["model"]
    assert max(float((one[key] - run[key]).abs().max()) for key in one) < 1e-5


def images_of_step(step: int, rank: int) -> str:
    """The files of a rank in a step, in the order in which they are named."""
    train_set, _ = build_data(RunConfig.load("tiny.yaml"), Ranks(0, 1, torch.device("cpu")))
    (keys,) = StepSampler(len(train_set), 8, 4, rank, 2, 0, start_step=step, total_steps=step + 1)
    return ", ".join(train_set.source.name(index) for _, index, _ in keys)


@pytest.mark.slow
def test_signals_and_another_number_of_ranks_after_them(project: Path, caplog: Any) -> None:
    """To torchrun, which passes them on to all, and to one rank."""
    arguments = ["training.validate_every_steps=100000", "data.num_workers=1"]
    steps = "training.max_steps=100000"
    with ExitStack() as stack:
        ranks = ranks_by_hand(*arguments, steps, "--run-dir", "SIGUSR1")
        one, other = map(stack.enter_context, ranks)
        all_running = {"SIGUSR1": one}
        for run in ("SIGTERM", "SIGINT"):
            command = [*TWO, SCRIPT, "tiny.yaml", *arguments, steps, "--run-dir", run]
            all_running[run] = stack.enter_context(Running(*command))
        for run, running in all_running.items():
            running.wait_until(lambda run=run: metrics(run))
            (other if run == "SIGUSR1" else running).send(signal.Signals[run])
        for run, running in all_running.items():
            # torchrun reports an error for a signal, for any exit codes of its ranks
            assert running.end() == (0 if run == "SIGUSR1" else 1), running.errors
            step = status(run)["step"]
            assert (status(run)["state"], status(run)["reason"]) == ("stopped", run)
            lines = running.errors.splitlines()
            assert any(is_about(line, run, f"step {step}", 100000) for line in lines)
            assert saved_steps(run) == [step]
            told = running.errors + (other.errors if run == "SIGUSR1" else "")
            assert f"[rank 1] {run}: " in told
        assert other.end() == 0

        three = ranks_by_hand(*arguments, steps, "--run-dir", "SIGTERM", number=3)
        for rank in three:
            stack.enter_context(rank)
        assert [rank.end() for rank in three] == [2, 2, 2]
        for rank, prefix in ((three[0], "kl-vae train: "), (three[2], "kl-vae train [rank 2]: ")):
            (line,) = rank.errors.splitlines()
            assert line.startswith(f"{prefix}error: ")
            assert is_about(line, "training.global_batch_size=8", 3, "ranks")
        assert status("SIGTERM")["state"] == "stopped"

    caplog.set_level("INFO")
    for run in ("SIGTERM", "SIGINT", "SIGUSR1"):
        caplog.clear()
        steps = status(run)["step"] + 2
        resumed = ["tiny.yaml", *arguments, f"training.max_steps={steps}", "--run-dir", run]
        assert main(["train", *resumed]) == 0
        assert re.search(r"\b8 images .*= 1 .* x 2 .* x 4\b", caplog.text)
        lines = [line["step"] for line in metrics(run) if "train/psnr" in line]
        assert lines == list(range(1, steps + 1))
        assert status(run)["state"] == "finished"
