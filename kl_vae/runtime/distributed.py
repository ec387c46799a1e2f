"""The processes that work together: one a GPU, or one or more on CPUs."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from kl_vae.runtime.device import choose_device
from kl_vae.runtime.errors import RunError

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Mends:
    """How the work that was ended is asked for less, and taken up again."""

    resume: str
    timeout: str
    images: str
    workers: str
    memory: str


TRAINING = Mends(
    resume="the same command goes on from the last checkpoint",
    timeout="training.timeout_seconds",
    images="data.train.root",
    workers="data.num_workers",
    memory="set training.activation_checkpointing=blocks, or raise training.accumulate_batches",
)
COMMAND = Mends(
    resume="the same command with --resume goes on where it was",
    timeout="the time limit",
    images="--images",
    workers="--num-workers",
    memory="lower --batch-size, or give --precision bf16",
)


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


def explain(error: Exception, roll_call: RollCall | None, mends: Mends = TRAINING) -> Exception:
    """Return what to raise in place of `error`: a RunError where it has a known cause.

    Among several ranks the others are told why this one ends, or asked which of them was lost.
    """
    failure = _failure(error, roll_call, mends)
    if roll_call is not None:
        roll_call.leave(str(failure) or type(failure).__name__)
    return failure


def _failure(error: Exception, roll_call: RollCall | None, mends: Mends) -> Exception:
    text = " ".join(str(error).split())
    if isinstance(error, (RunError, ValueError)):
        return error
    if roll_call is not None and _is_of_another_rank(error):
        return RunError(f"{roll_call.lost()}; {mends.resume} ({text})")
    if isinstance(error, RuntimeError) and "DataLoader timed out" in text:
        return RunError(
            f"the data workers gave no batch within {mends.timeout} ({text}): "
            f"look at the storage of {mends.images}, or raise it"
        )
    noticed = isinstance(error, RuntimeError) and "DataLoader worker (pid" in text
    # or it was handing over a batch when it was killed, and torch does not notice that it was
    if noticed or isinstance(error, (ConnectionError, EOFError)):
        return RunError(
            f"a data worker ended ({text or type(error).__name__}): mostly memory ran out (dmesg, "
            f"free -h) or /dev/shm is full (df -h /dev/shm); lower {mends.workers}, or give more "
            "of it"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(f"the memory of the GPU does not suffice ({text}): {mends.memory}")
    if isinstance(error, OSError):
        return RunError(f"{text}; mend it and give the same command again")
    return error


def _is_of_another_rank(error: Exception) -> bool:
    """Whether a collective operation failed, which is what the loss of a rank looks like."""
    # gloo has no type of its own; each of its errors names its source file
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


# for the others to say that they are there; they fail at about the same time
PATIENCE_SECONDS = 5.0

_LOST_ANOTHER = "lost another rank"


@dataclass
class RollCall:
    """A rank that ends with an error leaves its reason in the store, where the others find it."""

    store: Store
    rank: int
    world_size: int
    _left: bool = False
    _store_hangs: bool = False

    def leave(self, reason: str) -> None:
        """Say why this rank ends; what it says first counts."""
        if self._left:
            return
        self._left = True
        try:
            self.store.set(f"ended/{self.rank}", reason)
        except RuntimeError:  # the store went with the rank that holds it
            pass

    def lost(self) -> str:
        """Say which ranks ended, after a collective operation of this one has failed.

        Ranks that neither left a reason nor answer within `PATIENCE_SECONDS` are gone.
        """
        self.leave(_LOST_ANOTHER)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline = time.monotonic() + PATIENCE_SECONDS
        silent: list[str] = []
        for rank in others:
            reason = self._reason(rank, max(0.1, deadline - time.monotonic()))
            if reason is None:
                silent.append(str(rank))
                if self._store_hangs:
                    break  # of the others nobody can tell
            elif reason != _LOST_ANOTHER:
                return f"rank {rank} failed: {reason}"
        if not silent:
            return "the connection between the ranks was lost: look at the network"
        ranks = f"rank{'s' * (len(silent) > 1)} {', '.join(silent)}"
        return (
            f"{ranks} ended without a word, or stopped answering: killed, out of memory (dmesg), "
            "or a machine is gone"
        )

    def _reason(self, rank: int, seconds: float) -> str | None:
        answers: list[str] = []

        def ask() -> None:
            key = f"ended/{rank}"
            # an error: nothing came, or the store is gone with the rank that holds it
            with suppress(RuntimeError):
                self.store.wait([key], timedelta(seconds=seconds))
                answers.append(self.store.get(key).decode())

        # where the machine of the store hangs a call never comes back, whatever its time-out
        thread = Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds + 1.0)
        self._store_hangs = thread.is_alive()
        return answers[0] if answers else None


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def check_agreement(module: nn.Module, ranks: Ranks, step: int) -> None:
    """Compare the bits of every parameter with those of rank 0; all ranks call this.

    It reads each parameter once and sends one number a tensor. Buffers are left out: of batch
    norms without synchronisation they are each rank's own.

    Raises:
        RunError: naming the first parameter that differs, and where.
    """
    if ranks.world_size == 1:
        return
    names = [name for name, _ in module.named_parameters()]
    sums = torch.tensor(ranks.gather(checksums(module)))  # [rank, parameter]
    differing = (sums != sums[0]).any(dim=0).nonzero().flatten().tolist()
    if differing:
        first = differing[0]
        others = (sums[:, first] != sums[0, first]).nonzero().flatten().tolist()
        raise RunError(
            f"step {step}: {len(differing)} of {len(names)} parameters differ between the ranks, "
            f"{names[first]} first, on rank {', '.join(map(str, others))}: use the same torch and "
            "the same kind of device on all machines; the same command goes on from the last "
            "checkpoint"
        )


@torch.no_grad()
def checksums(module: nn.Module) -> list[int]:
    """A number for each parameter, of all its bits."""
    return torch.stack([_checksum(p) for p in module.parameters()]).tolist()


def _checksum(x: Tensor) -> Tensor:
    """The sum of the bits of all elements as integers, an int64 scalar."""
    return x.detach().view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64)
