"""Batches from worker processes.

Shapes: B batch, C channels, H and W height and width.
"""

import logging
import os
import signal
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kl_vae.data.dataset import ImageDataset, Sample
from kl_vae.data.sampler import Key, StepSampler

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Samples of one rank, in the order of the sampler."""

    images: Tensor  # [B,C,H,W], float32 in [-1, 1]; zeros where there is an error
    positions: Tensor  # [B], int64: in the global batch, or in the validation set
    errors: tuple[str, ...]  # B texts, empty where the image was read


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch."""
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        positions=torch.tensor([sample.position for sample in samples]),
        errors=tuple(sample.error for sample in samples),
    )


def training_loader(
    dataset: ImageDataset, sampler: StepSampler, num_workers: int, pin_memory: bool
) -> DataLoader[Sample]:
    """Return the loader of a whole run: one iterator gives `Batch` after `Batch`."""
    return _loader(dataset, sampler, num_workers, pin_memory)


def validation_loader(
    dataset: ImageDataset, batches: list[list[Key]], num_workers: int, pin_memory: bool
) -> DataLoader[Sample]:
    """Return the loader of one pass over a rank's `validation_batches`; it gives `Batch`."""
    return _loader(dataset, batches, num_workers, pin_memory)


def _loader(
    dataset: ImageDataset,
    batches: StepSampler | list[list[Key]],
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=_workers_that_fit(num_workers),
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the workers' seeds come from the global one
        worker_init_fn=_leave_signals_to_main_process,
    )


def _workers_that_fit(num_workers: int) -> int:
    """Limit the workers to the cores that this process may use: torch warns of more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores is None or num_workers <= cores:
        return num_workers
    logger.info("num_workers=%d: %d, since there are no more cores", num_workers, cores)
    return cores


def _leave_signals_to_main_process(_worker: int) -> None:
    # Ctrl-C and torchrun's SIGTERM reach the whole process group: a worker that
    # ended of them would fail the main process while it writes its last checkpoint
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
