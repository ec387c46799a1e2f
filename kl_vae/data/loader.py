"""Batches from worker processes.

Shapes: B batch, C channels, H and W height and width.
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

logger = logging.getLogger(__name__)

# of workers: not from a fork server, whose end they would wait for instead of this process's
START_METHOD = "fork" if sys.platform == "linux" else None

_PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent ends

# ask the main process to end a run, and nobody else
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class Batch(NamedTuple):
    """Samples of one rank, in the order of the sampler."""

    images: Tensor  # [B,C,H,W], uint8 or float32 in [-1, 1], see `normalized`; zeros: no image
    positions: Tensor  # [B], int64: in the global batch, or in the validation set
    names: tuple[str, ...]  # of the B files; empty where there is no image
    bad: tuple[BadImage, ...]  # files that could not be used

    def usable(self) -> "Batch":
        """Return the batch without the samples that have no image."""
        kept = [i for i, name in enumerate(self.names) if name]
        if len(kept) == len(self.names):
            return self
        names = tuple(self.names[i] for i in kept)
        return Batch(self.images[kept], self.positions[kept], names, self.bad)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch."""
    return Batch(
        images=_stacked([sample.image for sample in samples]),
        positions=torch.tensor([sample.position for sample in samples]),
        names=tuple(sample.name for sample in samples),
        bad=tuple(image for sample in samples for image in sample.bad),
    )


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Stack [C,H,W] to [B,C,H,W], in memory [B,H,W,C] as crops are: of each row bytes are copied.

    Where some are floats all become floats.
    """
    if len({image.dtype for image in images}) > 1:
        images = [normalized(image) for image in images]
    if len(images[0]) == 1:
        return _shared_stack(images)
    return _shared_stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _shared_stack(tensors: Sequence[Tensor]) -> Tensor:
    # in a worker it stacks them in memory that the main process sees, so that nothing is sent
    stacked: Tensor = default_collate(list(tensors))
    return stacked


def batch_loader(
    dataset: ImageDataset,
    batches: Sampler[list[Key]] | list[list[Key]],
    num_workers: int,
    pin_memory: bool,
    timeout_seconds: int,
) -> DataLoader[Sample]:
    """Return a loader that gives a `Batch` for each list of keys.

    Args:
        dataset: of the images.
        batches: a `StepSampler`, a rank's `validation_batches`, or other lists of keys.
        num_workers: processes that decode; 0: this one.
        pin_memory: of the batches, where they go to a GPU.
        timeout_seconds: for a batch of the workers; later it is a RuntimeError.
    """
    num_workers = workers_that_fit(num_workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        timeout=timeout_seconds if num_workers else 0,
        multiprocessing_context=START_METHOD if num_workers else None,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the workers' seeds come from the global one
        worker_init_fn=partial(start_worker, parent=os.getpid()),
    )


def workers_that_fit(num_workers: int) -> int:
    """Limit the workers to the cores that this process may use: torch warns of more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores is None or num_workers <= cores:
        return num_workers
    logger.info("num_workers=%d: %d, since there are no more cores", num_workers, cores)
    return cores


def start_worker(_worker: int, parent: int) -> None:
    """Let a worker outlive the signals that ask its `parent` to end, and never the parent itself.

    Args:
        _worker: its number.
        parent: the process that it works for.
    """
    # Ctrl-C and torchrun's SIGTERM reach the whole process group: a worker that
    # ended of them would fail the main process while it writes its last checkpoint
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # where the main process is killed its workers would stay for seconds, or for ever, and with
    # them its connections, by which other ranks notice its end
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before
            os._exit(1)
