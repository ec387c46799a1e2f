"""The processes that work together: one a GPU, or one or more on CPUs."""

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
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from kl_vae.device import choose_device
from kl_vae.distributed.failures import TRAINING, Mends, explain
from kl_vae.distributed.roll_call import RollCall
from kl_vae.errors import RunError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together."""

    rank: int
    world_size: int
    device: torch.device
    roll_call: RollCall | None = None  # among several

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
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Of each flag whether any rank says so."""
        return self.sum(torch.tensor(flags).int()).bool().tolist()

    def gather(self, value: Result) -> list[Result]:
        """The value of each rank: plain values, in the order of the ranks, on all of them."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Do `work` on rank 0 and give its result to all; what fails there fails on all ranks.

        Raises:
            ValueError: `work` raised one on rank 0; any other error is a RunError elsewhere.
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
            raise ValueError(outcome[1]) if outcome[2] else RunError(f"rank 0: {outcome[1]}")
        result: Result = outcome[0]
        return result


@contextmanager
def connect(
    device_name: str, timeout_seconds: int = 600, mends: Mends = TRAINING
) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be the only one.

    Within the context an error is put into words that say what to do, and where a rank ends with
    one, or is lost, the errors of the others name it.

    Args:
        device_name: see `choose_device`.
        timeout_seconds: for the ranks to meet, and of any collective operation.
        mends: what the errors say of how to go on.

    Raises:
        ValueError: the device is not there.
        RunError: a rank was lost, a data worker ended, memory or disk do not suffice.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks(0, 1, device) if world_size == 1 else _join(device, timeout_seconds, mends)
    parts = world_size > 1
    try:
        yield ranks
    except Exception as error:
        if device.type == "cuda":
            parts = False  # nccl would wait for ranks that may be gone
        failure = explain(error, ranks.roll_call, mends)
        if failure is error:
            raise
        raise failure from error
    finally:
        if parts:
            _part()


def _join(device: torch.device, timeout_seconds: int, mends: Mends) -> Ranks:
    # CPU tensors (figures, flags) go by gloo also where gradients go by nccl
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        group_store = PrefixStore(f"group/{attempt}", store)
        dist.init_process_group(
            backend, store=group_store, rank=rank, world_size=world_size, timeout=timeout
        )
    except dist.DistError as error:
        raise RunError(
            f"the ranks did not meet within {mends.timeout}={timeout_seconds} "
            f"({' '.join(str(error).split())}): start all of them, with one MASTER_ADDR"
        ) from error
    roll_call = RollCall(PrefixStore(f"roll_call/{attempt}", store), rank, world_size)
    return Ranks(rank, world_size, device, roll_call)


def _part() -> None:
    # DDP lies in reference cycles; freed after its process group it can deadlock (torch 2.6)
    gc.collect()
    dist.destroy_process_group()
