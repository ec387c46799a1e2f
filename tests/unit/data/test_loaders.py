"""Batches, the same from any number of worker processes."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae.data import (
    Batch,
    FolderSource,
    ImageDataset,
    Sample,
    StepSampler,
    collate,
    list_images,
    training_loader,
    validation_batches,
    validation_loader,
)

# Python 3.12 warns of every fork in a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    return tmp_path


def dataset(root: Path, training: bool = True) -> ImageDataset:
    source = FolderSource(root, list_images(root, 3), channels=3)
    return ImageDataset(source, 16, None, flip=True, seed=0, training=training)


def batches(root: Path, num_workers: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    data = dataset(root)
    sampler = StepSampler(len(data), 4, 2, rank, ranks, seed=0, start_step=1, total_steps=6)
    return iter(training_loader(data, sampler, num_workers, pin_memory=False))


def test_collate() -> None:
    samples = [Sample(torch.full((3, 2, 2), float(i)), 10 + i, "bad" * i) for i in range(2)]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 2, 2)
    assert batch.images[1].unique().tolist() == [1]
    assert batch.positions.dtype == torch.int64
    assert batch.positions.tolist() == [10, 11]
    assert batch.errors == ("", "bad")


def test_workers_change_nothing(root: Path) -> None:
    alone, together = list(batches(root, 0)), list(batches(root, 2))
    assert len(alone) == len(together) == 10
    for one, other in zip(alone, together, strict=True):
        assert isinstance(other, Batch)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.positions, other.positions)
        assert other.errors == ("", "")


def test_loading_leaves_the_global_generator_alone(root: Path) -> None:
    before = torch.get_rng_state()
    list(batches(root, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_change_nothing(root: Path) -> None:
    whole = torch.cat([batch.images for batch in batches(root, 0)])
    ranks = [list(batches(root, 0, rank, 2)) for rank in range(2)]
    parts = torch.cat([batch.images for pair in zip(*ranks, strict=True) for batch in pair])
    assert torch.equal(parts, whole)


def test_a_damaged_file_does_not_end_a_worker(root: Path) -> None:
    for path in root.iterdir():
        path.write_bytes(b"damaged")
    assert all("not an image" in error for batch in batches(root, 1) for error in batch.errors)


def test_validation_loader(root: Path) -> None:
    data = dataset(root, training=False)
    loader = validation_loader(data, validation_batches(12, 5, 0, 1), 0, pin_memory=False)
    positions = [batch.positions.tolist() for batch in loader]
    assert positions == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert list(validation_loader(data, [], 1, pin_memory=False)) == []


class Probe(ImageDataset):
    """Tells what its process does with signals, and how many threads it uses."""

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        ignored = [handler == signal.SIG_IGN for handler in handlers]
        return Sample(torch.zeros(1), key[2], f"{os.getpid()} {ignored} {torch.get_num_threads()}")


def test_workers_leave_signals_to_the_main_process(root: Path) -> None:
    probe = Probe(FolderSource(root, ["a.png"], 3), 16, None, flip=True, seed=0, training=True)
    loader = validation_loader(probe, [[(0, 0, 0)]], 1, pin_memory=False)
    (batch,) = loader
    pid, rest = batch.errors[0].split(" ", 1)
    assert int(pid) != os.getpid()
    assert rest == "[True, True] 1"
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def test_no_more_workers_than_cores(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    cores = len(os.sched_getaffinity(0))
    with caplog.at_level(logging.INFO):
        loader = validation_loader(dataset(root), [], cores + 3, pin_memory=False)
    assert loader.num_workers == cores
    assert f"num_workers={cores + 3}: {cores}, since there are no more cores" in caplog.text
