"""What a call costs: its time, by turns with others in one process, and its passes of networks."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Timing:
    """How long the calls of one candidate took, in seconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Of one duration a call, at least one."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))

    def divided(self, number: int) -> Timing:
        """Of one of so many equal parts of each call."""
        return Timing(self.median / number, self.low / number, self.high / number)

    @property
    def cells(self) -> str:
        """Two cells of a Markdown row: the median, and the lowest to the highest."""
        return f"{self.median:.4g} | {self.low:.4g} to {self.high:.4g}"


def alternate(
    candidates: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Call each candidate `repeats` times, by turns, after one call each that is not timed.

    What else the machine does and how warm it is then strikes all alike. Each round begins with the
    next candidate, so that none always follows the same one.

    Args:
        candidates: what to time, by name.
        repeats: calls of each, 1 or more.
        device: what they compute on; a duration ends when it has finished.
    """
    names = list(candidates)
    for name in names:
        candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_duration(candidates[name], device))
    return {name: Timing.of(values) for name, values in seconds.items()}


def _duration(call: Callable[[], object], device: torch.device) -> float:
    gc.collect()  # what the one before has left is not this one's to clear
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass
class Passes:
    """How often a network was passed."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counting(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, Passes]]:
    """Count the passes of networks whose output is one tensor; by their names, as they happen."""
    counted = {name: Passes() for name in networks}

    def hook(passes: Passes) -> Callable[[nn.Module, object, Tensor], None]:
        def count_backward(_: Tensor) -> None:
            passes.backward += 1

        def count_forward(_: nn.Module, __: object, output: Tensor) -> None:
            passes.forward += 1
            if output.requires_grad:
                output.register_hook(count_backward)  # type: ignore[no-untyped-call]

        return count_forward

    handles = [
        network.register_forward_hook(hook(counted[name])) for name, network in networks.items()
    ]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def synchronisations(call: Callable[[], object], device: torch.device) -> int | None:
    """How often a call lets the CPU wait for the GPU, as torch's sync debug mode sees it.

    None on other devices, which know no such waiting.
    """
    if device.type != "cuda":
        return None
    _synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
