"""Data loader: batches from worker processes.

Shapes: B batch, C channels, H height, W width.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from kl_vae.data.dataset import BadImage, ImageDataset, Sample
from kl_vae.data.pixels import normalized
from kl_vae.data.sampler import Key

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# start method of workers: with a fork server, PR_SET_PDEATHSIG would refer to the server instead
# of the main process
START_METHOD = "fork" if sys.platform == "linux" and hasattr(os, "fork") else None

_OPEN_FILES = 64  # of a process without workers
_OPEN_FILES_PER_WORKER = 32  # pipes, and batches in shared memory, of training and validation

_PR_SET_PDEATHSIG = 1  # Linux: signal sent to a process when its parent dies

# signals that ask the main process to stop a run; workers ignore them
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class Batch(NamedTuple):
    """A batch of samples of one rank, in sampler order."""

    images: Tensor  # [B,C,H,W], uint8 or float32 in [-1, 1], see `normalized`; zeros: no image
    positions: Tensor  # [B], int64: in the global batch, or in the validation set
    names: tuple[str, ...]  # of the B files; empty string: no image
    bad: tuple[BadImage, ...]  # unusable files

    def usable(self) -> "Batch":
        """Return the batch without samples that have no image."""
        kept = [i for i, name in enumerate(self.names) if name]
        if len(kept) == len(self.names):
            return self
        names = tuple(self.names[i] for i in kept)
        return Batch(self.images[kept], self.positions[kept], names, self.bad)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch."""
    return Batch(
        images=_stack_images([sample.image for sample in samples]),
        positions=torch.tensor([sample.position for sample in samples]),
        names=tuple(sample.name for sample in samples),
        bad=tuple(image for sample in samples for image in sample.bad),
    )


def _stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stack [C,H,W] to channels-last [B,C,H,W], which keeps the memory layout of the crops.

    If the dtypes differ, all images are converted to float32.
    """
    if len({image.dtype for image in images}) > 1:
        images = [normalized(image) for image in images]
    if len(images[0]) == 1:
        return _stack_shared(images)
    return _stack_shared([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _stack_shared(tensors: Sequence[Tensor]) -> Tensor:
    # in a worker, default_collate stacks to shared memory
    stacked: Tensor = default_collate(list(tensors))
    return stacked


def batch_loader(
    dataset: ImageDataset,
    batches: Sampler[list[Key]] | list[list[Key]],
    num_workers: int,
    pin_memory: bool,
    timeout_seconds: int,
    persistent: bool = False,
) -> DataLoader[Sample]:
    """Return a loader that yields a `Batch` for each list of keys.

    Args:
        dataset: the images.
        batches: a `StepSampler`, a rank's `validation_batches`, or other lists of keys.
        num_workers: number of decoding processes; 0: decode in this process.
        pin_memory: copy batches to pinned memory, for transfer to a GPU.
        timeout_seconds: maximum time to wait for a batch from the workers; the loader raises
            RuntimeError after it.
        persistent: keep the workers for the next iteration.
    """
    num_workers = workers_that_fit(num_workers)
    check_open_files(num_workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        timeout=timeout_seconds if num_workers else 0,
        persistent_workers=persistent and num_workers > 0,
        multiprocessing_context=START_METHOD if num_workers else None,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # keeps the loader from drawing from the global generator
        worker_init_fn=partial(start_worker, parent=os.getpid()),
    )


def workers_that_fit(num_workers: int) -> int:
    """Return `num_workers`, limited to the number of CPU cores available to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores is None or num_workers <= cores:
        return num_workers
    logger.info("num_workers=%d: reduced to %d, the number of available cores", num_workers, cores)
    return cores


def check_open_files(num_workers: int) -> None:
    """Raise this process's limit on open files to what the workers need, if it can be.

    A worker that reaches the limit loses its batch, for which the main process then waits.

    Raises:
        ValueError: the limit is too low.
    """
    if resource is None:  # Windows
        return
    needed = _OPEN_FILES + num_workers * _OPEN_FILES_PER_WORKER
    limit, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return
    if maximum != resource.RLIM_INFINITY and maximum < needed:
        raise ValueError(
            f"num_workers={num_workers}: needs {needed} open files, and the limit is {maximum}; "
            "raise it with ulimit -n 4096, or lower num_workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, maximum))
    logger.info("the limit on open files (ulimit -n) is raised from %d to %d", limit, needed)


def start_worker(_worker: int, parent: int) -> None:
    """Initialize a worker: ignore stop signals, and exit when the parent process dies.

    Args:
        _worker: worker index.
        parent: process ID of the main process.
    """
    # Ctrl-C and torchrun's SIGTERM reach the whole process group: the exit of a worker would
    # raise an error in the main process while it saves its last checkpoint
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # workers that survive the main process would keep its connections open, and other ranks would
    # not notice its death
    if START_METHOD == "fork":  # elsewhere torch's watchdog ends them
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)
