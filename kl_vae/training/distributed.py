"""The processes that train together: one a GPU, or one or more on CPUs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kl_vae.device import choose_device

TIMEOUT = timedelta(minutes=10)  # of any collective operation

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, on the CPU (float64 stays float64)."""
        values = values.detach().cpu().clone()  # reduced in place
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, figures: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean of each scalar or vector over all ranks, float64 on the CPU."""
        values = [value.detach().cpu().double() for value in figures.values()]
        mean = self.sum(torch.cat([value.flatten() for value in values])) / self.world_size
        parts = torch.split(mean, [value.numel() for value in values])
        return {
            key: part.reshape(value.shape)
            for key, part, value in zip(figures, parts, values, strict=True)
        }

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Do `work` on rank 0 and give its result to all; what fails there fails on all ranks.

        Raises:
            ValueError: `work` raised one on rank 0; any other error is a RuntimeError elsewhere.
        """
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None, False]  # result, error, whether it is a ValueError
        failure: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as error:  # any: the others wait for the outcome
                failure = error
                outcome[1:] = [str(error) or repr(error), isinstance(error, ValueError)]
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise ValueError(outcome[1]) if outcome[2] else RuntimeError(f"rank 0: {outcome[1]}")
        result: Result = outcome[0]
        return result


@contextmanager
def connect(device_name: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be the only one.

    Raises:
        ValueError: the device is not there.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    # CPU tensors (figures, flags) go by gloo also where gradients go by nccl
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), world_size, device)
    finally:
        # DDP lies in reference cycles; freed after its process group it can deadlock (torch 2.6)
        gc.collect()
        dist.destroy_process_group()
