"""The processes of a distributed command: one per GPU, or one or more on CPUs."""

from __future__ import annotations

import errno
import gc
import os
import shlex
import sys
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

from kl_vae.runtime.device import choose_device, on_cpu
from kl_vae.runtime.errors import RunError, StorageError

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What error messages name: the settings to change, and how to resume."""

    resume: str
    timeout: str
    images: str
    workers: str
    memory: str


TRAINING = Hints(
    resume="the same command resumes from the last checkpoint",
    timeout="training.timeout_seconds",
    images="data.train.root",
    workers="data.num_workers",
    memory="set training.activation_checkpointing=blocks, or raise training.accumulate_batches",
)
COMMAND = Hints(
    resume="the same command with --resume continues the work",
    timeout="the time limit",
    images="--images",
    workers="--num-workers",
    memory="lower --batch-size, or give --precision bf16",
)


@dataclass(frozen=True)
class Ranks:
    """This process in the group of all ranks."""

    rank: int
    world_size: int
    device: torch.device
    monitor: RankMonitor | None = None  # if there are several

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on the CPU (float64 stays float64).

        A tensor on a GPU is summed there, by its own backend, and copied once.
        """
        values = values.detach()
        if values.device.type != "cuda":
            values = values.cpu()
        values = values.clone()  # reduced in place
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.cpu()

    def mean(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of each scalar or vector over all ranks, float64 on the CPU."""
        values = on_cpu(list(metrics.values()))
        mean = self.sum(torch.cat([value.flatten() for value in values])) / self.world_size
        parts = torch.split(mean, [value.numel() for value in values])
        return {
            key: part.reshape(value.shape)
            for key, part, value in zip(metrics, parts, values, strict=True)
        }

    def any_of(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        return self.sum(torch.tensor(flags).int()).bool().tolist()

    def gather(self, value: Result) -> list[Result]:
        """Return the plain values of all ranks, in the order of the ranks, on each of them."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_rank_zero(self, work: Callable[[], Result]) -> Result:
        """Call `work` on rank 0 and return its result on all; an error there is raised on all.

        Raises:
            ValueError: `work` raised one on rank 0; any other error is a RunError elsewhere.
        """
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None, False]  # result, error, whether it is a ValueError
        failure: Exception | None = None
        if self.is_rank_zero:
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
    device_name: str, timeout_seconds: int = 600, hints: Hints = TRAINING
) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or run alone.

    Within the context a known error is raised as a RunError that says what to do; if a rank fails
    or is lost, the errors of the others name it.

    Args:
        device_name: see `choose_device`.
        timeout_seconds: for the ranks to meet, and of any collective operation.
        hints: what the errors tell the user to change.

    Raises:
        ValueError: the device does not exist, or several processes were started without torchrun.
        RunError: a rank was lost, a data worker ended, the storage of the images failed, too many
            open files, out of memory or disk space.
    """
    _check_launcher()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = (
        int(os.environ.get(key, default))
        for key, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    device = choose_device(device_name, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks(0, 1, device) if world_size == 1 else _join(device, timeout_seconds, hints)
    leave = world_size > 1
    try:
        yield ranks
    except Exception as error:
        leave &= device.type != "cuda"  # nccl would wait for ranks that may be gone
        explained = explain(error, ranks.monitor, hints)
        if explained is error:
            raise
        raise explained from error
    finally:
        if leave:
            # DDP lies in reference cycles; freed after its process group it can deadlock (2.6)
            gc.collect()
            dist.destroy_process_group()


# the process's number and the number of processes, of launchers that do not set WORLD_SIZE
_LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE"),
}


def _check_launcher() -> None:
    """Check that several processes were started by torchrun; without it each would train alone."""
    if {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return
    for launcher, (rank, number) in _LAUNCHERS.items():
        if rank not in os.environ or int(os.environ.get(number, "1")) < 2:
            continue
        arguments = shlex.join(sys.argv[1:])
        nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
        if launcher == "srun" and nodes != "1":
            fix = (
                f"srun --ntasks-per-node=1 torchrun --nnodes {nodes} --nproc-per-node gpu "
                '--rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$(scontrol show '
                f'hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" -m kl_vae {arguments}'
            )
        else:
            fix = f"torchrun --nproc-per-node {os.environ[number]} -m kl_vae {arguments}"
        raise ValueError(
            f"{number}={os.environ[number]}: {launcher} started this as process "
            f"{os.environ[rank]} of several, which cannot find each other; start one torchrun per "
            f"machine: {fix}"
        )


def _join(device: torch.device, timeout_seconds: int, hints: Hints) -> Ranks:
    # CPU tensors (metrics, flags) travel by gloo even if gradients travel by nccl
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=PrefixStore(f"group/{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except dist.DistError as error:
        raise RunError(
            f"the ranks did not meet within {hints.timeout}={timeout_seconds} "
            f"({_one_line(error)}): start all of them, with the same MASTER_ADDR"
        ) from error
    monitor = RankMonitor(PrefixStore(f"monitor/{attempt}", store), rank, world_size)
    return Ranks(rank, world_size, device, monitor)


def explain(
    error: Exception, monitor: RankMonitor | None = None, hints: Hints = TRAINING
) -> Exception:
    """Return a RunError for an error with a known cause, else the error itself.

    With several ranks the reason is left for the others, or the rank that was lost is named.
    """
    explained = _explain(error, monitor, hints)
    if monitor is not None:
        monitor.leave(str(explained) or type(explained).__name__)
    return explained


def _explain(error: Exception, monitor: RankMonitor | None, hints: Hints) -> Exception:
    text = _one_line(error)
    storage_failed = isinstance(error, StorageError)
    if not storage_failed and isinstance(error, (RunError, ValueError)):
        return error
    if _is_file_limit(error):
        return RunError(
            f"too many open files ({text}): raise the limit with ulimit -n 4096, or lower "
            f"{hints.workers}; {hints.resume}"
        )
    if storage_failed:
        return RunError(f"the storage failed: {text}; check {hints.images}; {hints.resume}")
    # a collective operation fails if a rank is lost; gloo's errors name its source files
    if monitor is not None and (
        isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    ):
        return RunError(f"{monitor.find_lost_rank()}; {hints.resume} ({text})")
    if isinstance(error, RuntimeError) and "DataLoader timed out" in text:
        return RunError(
            f"the data workers returned no batch within {hints.timeout} ({text}): check the "
            f"storage of {hints.images}, or raise {hints.timeout}"
        )
    # torch does not notice a worker that is killed while it sends a batch: its connection breaks
    killed = isinstance(error, RuntimeError) and "DataLoader worker (pid" in text
    if killed or isinstance(error, (ConnectionError, EOFError)):
        return RunError(
            f"a data worker ended ({text or type(error).__name__}): usually memory ran out (dmesg, "
            f"free -h) or /dev/shm is full (df -h /dev/shm); lower {hints.workers}, or add memory"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(f"out of memory on the GPU ({text}): {hints.memory}")
    if isinstance(error, OSError):
        return RunError(f"{text}; fix it and run the same command again")
    return error


def _is_file_limit(error: BaseException | None) -> bool:
    """Return whether the limit on open files caused an error; torch names it in several ways."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            return True
        if any(text in str(error) for text in ("Too many open files", "items of ancdata")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if text.startswith("Caught "):  # torch's report of a data worker: the traceback, then its error
        name, _, reason = text.splitlines()[-1].partition(": ")
        text = reason or name
    return " ".join(text.split())


# in which the other ranks leave their reasons; they fail at about the same time
PATIENCE_SECONDS = 5.0

_LOST_ANOTHER = "lost another rank"


@dataclass
class RankMonitor:
    """The reasons of failing ranks, in the store of the process group, for the other ranks."""

    store: Store
    rank: int
    world_size: int
    _left: bool = False

    def leave(self, reason: str) -> None:
        """Store the reason why this rank ends; only the first call counts."""
        if not self._left:
            self._left = True
            with suppress(RuntimeError):  # the store is gone with the rank that holds it
                self.store.set(f"ended/{self.rank}", reason)

    def find_lost_rank(self) -> str:
        """Return which ranks ended and why, after a collective operation of this one has failed.

        Ranks without a reason within `PATIENCE_SECONDS` count as lost.
        """
        self.leave(_LOST_ANOTHER)
        silent = [rank for rank in range(self.world_size) if rank != self.rank]
        reasons: dict[int, str] = {}

        deadline = time.monotonic() + PATIENCE_SECONDS

        def collect() -> None:
            with suppress(RuntimeError):  # the store is gone with the rank that holds it
                while silent and time.monotonic() < deadline:
                    for rank in list(silent):
                        if self.store.check([f"ended/{rank}"]):
                            reasons[rank] = self.store.get(f"ended/{rank}").decode()
                            silent.remove(rank)
                    time.sleep(0.05)

        # a call never returns if the machine of the store hangs, regardless of its timeout
        thread = Thread(target=collect, daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline:
            if set(reasons.values()) - {_LOST_ANOTHER}:
                break
            thread.join(0.05)
        for rank, reason in list(reasons.items()):
            if reason != _LOST_ANOTHER:
                return f"rank {rank} failed: {reason}"
        if not silent:
            return "the connection between the ranks was lost: check the network"
        return (
            f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} ended without a message, "
            "or stopped responding: killed, out of memory (dmesg), or the machine is gone"
        )


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_agreement(module: nn.Module, ranks: Ranks, step: int) -> None:
    """Compare the bits of every parameter with those of rank 0; all ranks call this.

    It reads each parameter once and sends one number per tensor. Buffers are left out: those of
    batch norms without synchronisation differ between ranks.

    Raises:
        RunError: naming the first parameter that differs, and the ranks.
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
            "the same kind of device on all machines; the same command resumes from the last "
            "checkpoint"
        )


@torch.no_grad()
def checksums(module: nn.Module) -> list[int]:
    """Return for each parameter the int64 sum of its elements' bits, read as integers."""
    sums = [
        p.detach().view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64)
        for p in module.parameters()
    ]
    return torch.stack(sums).tolist()
