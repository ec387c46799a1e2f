"""What becomes of a run of several processes when something goes wrong with one of them."""

from __future__ import annotations

import os
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
WITHOUT_A_MESSAGE = (
    "ended without a message, or stopped responding: killed, out of memory (dmesg), or the machine "
    "is gone; the same command resumes from the last checkpoint ("
)


def last_error(running: Running) -> str:
    """The error that a rank has ended with."""
    errors = [line for line in running.errors.splitlines() if line.startswith("kl-vae train")]
    assert errors, running.errors
    return errors[-1]


def assert_first_rank_failed(running: Running, run: str, reason: str) -> None:
    """Rank 0, or torchrun, has ended with an error that begins so, and status.json says it."""
    assert last_error(running).startswith(f"kl-vae train: error: {reason}")
    assert status(run)["state"] == "failed"
    assert status(run)["reason"].startswith(f"RunError: {reason}")


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
        assert_first_rank_failed(torchrun, "torchrun", f"rank 1 {WITHOUT_A_MESSAGE}")


def killed() -> None:
    """Without torchrun, after 6 steps."""
    arguments = (*faulty_loss(Path()), *LONG, "training.save_every_steps=2")
    first, second = ranks_by_hand(*arguments, "--run-dir", "killed", FAULTS="wait@train:6:1")
    with first, second:
        second.wait_at_gate()
        assert saved_steps("killed") == [4, 6]
        second.send(signal.SIGKILL)
        assert first.end() == 1
        assert_first_rank_failed(first, "killed", f"rank 1 {WITHOUT_A_MESSAGE}")


def stopped() -> None:
    arguments = (*LONG, "training.timeout_seconds=10")
    first, second = ranks_by_hand(*arguments, "--run-dir", "stopped")
    with first, second:
        first.wait_until(lambda: metrics("stopped"))
        second.send(signal.SIGSTOP)
        assert first.end() == 1
        assert_first_rank_failed(first, "stopped", f"rank 1 {WITHOUT_A_MESSAGE}")
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
        assert lost.startswith("ranks 0, 2 ended without a message")


def restarted() -> None:
    """By torchrun: the run goes on from its last checkpoint by itself, to its end."""
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
        failed = f"the last part of this run failed: RunError: rank 1 {WITHOUT_A_MESSAGE}"
        assert failed in torchrun.errors
        assert "6 steps, 2 of them taken" in torchrun.errors
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
        reason = "rank 1 failed: boom; the same command resumes from the last checkpoint ("
        assert_first_rank_failed(boom, "boom", reason)
        assert saved_steps("boom") == [1, 2]

        # no finite loss: both leave the step out, and go on
        assert (first.end(), second.end()) == (1, 1), first.errors
        assert (
            "step 3 is skipped: the loss on rank 1 is not finite (1 so far, 1 in a row); its "
            f"images:\n  rank 1: {images_of_step(2, rank=1)}\n"
        ) in first.errors
        assert "rank 0: " not in first.errors
        assert_same(checkpoint("run", 2)["model"], checkpoint("run", 3)["model"])
        assert [line["skipped_steps"] for line in metrics("run")] == [0, 0, 1, 1]

        # parameters that differ: nothing is saved of them
        number = len(checkpoint("run", 4)["model"])
        reason = (
            f"step 5: 1 of {number} parameters differ between the ranks, loss.idle first, on rank "
            "1: use the same torch and the same kind of device on all machines; the same command "
            "resumes from the last checkpoint"
        )
        assert_first_rank_failed(first, "run", reason)
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
            # torchrun has an error of its own for a signal, whatever the exit codes of its ranks
            assert running.end() == (0 if run == "SIGUSR1" else 1), running.errors
            step = status(run)["step"]
            assert (status(run)["state"], status(run)["reason"]) == ("stopped", run)
            assert (
                f"\nstopped by {run} at step {step} of 100000, saved in {run}; the same command "
                "resumes\n"
            ) in running.errors
            assert saved_steps(run) == [step]
            told = running.errors + (other.errors if run == "SIGUSR1" else "")
            assert f"[rank 1] {run}: stopping after this step; once more ends at once" in told
        assert other.end() == 0

        three = ranks_by_hand(*arguments, steps, "--run-dir", "SIGTERM", number=3)
        for rank in three:
            stack.enter_context(rank)
        assert [rank.end() for rank in three] == [2, 2, 2]
        message = (
            "error: training.global_batch_size=8: cannot be divided among 3 ranks; resume on a "
            "number of ranks that divides it\n"
        )
        assert three[0].errors == f"kl-vae train: {message}"
        assert three[2].errors == f"kl-vae train [rank 2]: {message}"
        assert status("SIGTERM")["state"] == "stopped"

    caplog.set_level("INFO")
    for run in ("SIGTERM", "SIGINT", "SIGUSR1"):
        caplog.clear()
        steps = status(run)["step"] + 2
        resumed = ["tiny.yaml", *arguments, f"training.max_steps={steps}", "--run-dir", run]
        assert main(["train", *resumed]) == 0
        assert "8 images per step = 1 (ranks) x 2 (accumulated) x 4" in caplog.text
        lines = [line["step"] for line in metrics(run) if "train/psnr" in line]
        assert lines == list(range(1, steps + 1))
        assert status(run)["state"] == "finished"
