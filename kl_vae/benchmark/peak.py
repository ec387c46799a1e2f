"""The time and the largest memory of one call, each in a process of its own.

A process' largest memory never falls, so that what one call took can only be told where no other
was made before it.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from kl_vae.runtime.errors import RunError
from kl_vae.runtime.memory import give_back_memory

_STATUS = Path("/proc/self/status")  # Linux alone


@dataclass(frozen=True)
class Cost:
    """What a call took.

    Attributes:
        seconds: its duration.
        before: bytes that were in use before it (Python, torch, the model, the input).
        peak: bytes that were in use at most; on CUDA of the GPU's memory, else of the process.
    """

    seconds: float
    before: int
    peak: int


def cost_of(
    prepare: Callable[[], Callable[[], object]], device: torch.device, threads: int
) -> Cost:
    """Measure, in a new process, what the call takes that `prepare` returns.

    Args:
        prepare: loads what the call needs; both can be pickled (a `partial` of a function of a
            module).
        device: what the call computes on.
        threads: that torch uses on the CPU.

    Raises:
        RunError: the process ended, mostly as memory did not suffice.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(prepare, device, threads, theirs))
    process.start()
    theirs.close()
    try:
        answer: Cost | str = ours.recv()
    except EOFError:
        process.join()
        raise RunError(
            f"a measurement ended without a word (exit code {process.exitcode}): mostly memory ran "
            "out; give smaller images"
        ) from None
    process.join()
    if isinstance(answer, str):
        raise RunError(f"a measurement failed: {answer}")
    return answer


def _measure(
    prepare: Callable[[], Callable[[], object]],
    device: torch.device,
    threads: int,
    connection: Connection,
) -> None:
    try:
        torch.set_num_threads(threads)
        call = prepare()
        give_back_memory(device)  # what preparing has left is not the call's
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _forget_the_peak()
        before = torch.cuda.memory_allocated(device) if on_cuda else _memory("VmRSS")
        start = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(device) if on_cuda else _memory("VmHWM")
        connection.send(Cost(seconds, before, peak))
    except Exception as error:  # the parent says it in one line
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _forget_the_peak() -> None:
    """Let `VmHWM` begin anew, where the system can: loading may have taken more than the call."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    except OSError:
        pass


def _memory(key: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most."""
    if _STATUS.is_file():
        found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        assert found is not None, "Linux tells it of every process"
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of macOS in bytes
    return peak if sys.platform == "darwin" else 1024 * peak
