"""Count how often a process waits for simulated GPUs, copies from them, and talks to other ranks.

Device operations of `DistributedDataParallel` itself, which averages gradients, are left out.
"""

from __future__ import annotations

import ctypes
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single")
_called: Counter[str] = Counter()


@dataclass
class Counts:
    """Counts of a piece of work on one rank.

    Attributes:
        waits: times that the host waited for a device.
        copies: copies from a device to the host.
        collectives: collective operations by module and backend, such as `guards nccl`.
        where: the lines of the package at which torch has seen a wait.
    """

    waits: int = 0
    copies: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    where: list[str] = field(default_factory=list)


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what is done in the context; the result is complete at its end."""
    counts = Counts()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            counts.where.append(" < ".join(_frames()[:2]))

    before, called, mode = _waits_and_copies(), Counter(_called), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    after = _waits_and_copies()
    counts.waits, counts.copies = after[0] - before[0], after[1] - before[1]
    counts.collectives = dict(_called - called)


def count_collectives() -> None:
    """Count the collective operations that are called from Python, from now on."""
    for name in _COLLECTIVES:
        if hasattr(dist, name):
            counting = _counting(getattr(dist, name))
            setattr(dist, name, counting)
            setattr(dist.distributed_c10d, name, counting)


def _counting(function: Callable[..., Any]) -> Callable[..., Any]:
    def counting(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        first = tensor[0] if isinstance(tensor, list) else tensor
        backend = "nccl" if first.is_cuda else "gloo"
        caller = next(x for x in _frames() if not x.startswith("distributed.py"))
        _called[f"{caller.partition('.py')[0]} {backend}"] += 1
        return function(tensor, *args, **kwargs)

    return counting


def _waits_and_copies() -> tuple[int, int]:
    values = (ctypes.c_long * 2)()
    ctypes.CDLL(os.environ["LD_PRELOAD"]).simulated_gpu_counts(values)
    return values[0], values[1]


def _frames() -> list[str]:
    """Return the package's lines on the stack, such as `guards.py:92`, the innermost first."""
    return [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in reversed(traceback.extract_stack())
        if "/kl_vae/" in frame.filename
    ]
