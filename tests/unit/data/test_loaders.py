"""Batches do not depend on the number of worker processes."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kl_vae.data import (
    STOP_SIGNALS,
    BadImage,
    Batch,
    FolderSource,
    ImageDataset,
    JoinedSource,
    Key,
    Sample,
    StepSampler,
    batch_loader,
    collate,
    list_images,
    open_root,
    validation_batches,
)
from tests.messages import is_about
from tests.shards import write_shard

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


def loader_of(
    data: ImageDataset, batches: StepSampler | list[list[Key]], num_workers: int
) -> "DataLoader[Sample]":
    return batch_loader(data, batches, num_workers, pin_memory=False, timeout_seconds=60)


def batches(root: Path, num_workers: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    data = dataset(root)
    sampler = StepSampler(len(data), 4, 2, rank, ranks, seed=0, start_step=1, total_steps=6)
    return iter(loader_of(data, sampler, num_workers))


def test_sources_are_sent_to_workers_that_are_not_forked(root: Path) -> None:
    folder, shards = dataset(root).source, root / "shards"
    write_shard(shards / "0.tar", {path.name: path.read_bytes() for path in root.iterdir()})
    tar = open_root(str(shards), 3)
    part = tar.subset(np.arange(3, 6))
    for source in (folder, tar, part, JoinedSource([part, folder])):
        received = pickle.loads(pickle.dumps(source))
        assert [received.key(i) for i in range(3)] == [source.key(i) for i in range(3)]
        assert torch.equal(received.read(2), source.read(2))


def test_collate() -> None:
    bad = BadImage("b.png", "truncated")
    samples = [
        Sample(torch.full((3, 2, 2), float(i)), 10 + i, f"{i}.png" * i, (bad,) * (1 - i))
        for i in range(2)
    ]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 2, 2)
    assert batch.images[1].unique().tolist() == [1]
    assert batch.positions.dtype == torch.int64
    assert batch.positions.tolist() == [10, 11]
    assert batch.names == ("", "1.png")
    assert batch.bad == (bad,)
    usable = batch.usable()
    assert usable.names == ("1.png",) and usable.positions.tolist() == [11]
    assert usable.images.shape == (1, 3, 2, 2) and usable.bad == batch.bad
    assert usable.usable() is usable


def test_workers_do_not_change_batches(root: Path) -> None:
    alone, together = list(batches(root, 0)), list(batches(root, 2))
    assert len(alone) == len(together) == 10
    for one, other in zip(alone, together, strict=True):
        assert isinstance(other, Batch)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.positions, other.positions)
        assert other.names == one.names and all(other.names)
        assert other.bad == ()


def test_loading_leaves_the_global_generator_alone(root: Path) -> None:
    before = torch.get_rng_state()
    list(batches(root, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_do_not_change_batches(root: Path) -> None:
    whole = torch.cat([batch.images for batch in batches(root, 0)])
    ranks = [list(batches(root, 0, rank, 2)) for rank in range(2)]
    parts = torch.cat([batch.images for pair in zip(*ranks, strict=True) for batch in pair])
    assert torch.equal(parts, whole)


def test_a_damaged_file_does_not_end_a_worker(root: Path) -> None:
    for path in root.iterdir():
        path.write_bytes(b"damaged")
    for batch in batches(root, 1):
        assert batch.names == ("", "") and len(batch.bad) > 2
        assert all(is_about(bad.reason, "JPEG", "PNG") for bad in batch.bad)


def test_validation_loader(root: Path) -> None:
    data = dataset(root, training=False)
    loader = loader_of(data, validation_batches(12, 5, 0, 1), 0)
    positions = [batch.positions.tolist() for batch in loader]
    assert positions == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert list(loader_of(data, [], 1)) == []


class Probe(ImageDataset):
    """Return the signal handlers and the number of threads of the worker process."""

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        handlers = [signal.getsignal(getattr(signal, name)) for name in STOP_SIGNALS]
        ignored = all(handler == signal.SIG_IGN for handler in handlers)
        told = f"{os.getpid()} {ignored} {torch.get_num_threads()}"
        return Sample(torch.zeros(1), key[2], told, ())


def test_workers_leave_signals_to_the_main_process(root: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    probe = Probe(FolderSource(root, ["a.png"], 3), 16, None, flip=True, seed=0, training=True)
    (batch,) = loader_of(probe, [[(0, 0, 0)]], 1)
    pid, rest = batch.names[0].split(" ", 1)
    assert int(pid) != os.getpid()
    assert rest == "True 1"
    assert signal.getsignal(signal.SIGINT) == before


def test_no_more_workers_than_cores(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    cores = len(os.sched_getaffinity(0))
    with caplog.at_level(logging.INFO):
        loader = loader_of(dataset(root), [], cores + 3)
    assert loader.num_workers == cores
    assert is_about(caplog.text, f"num_workers={cores + 3}", cores)


ABANDONED = """
import sys, time
from pathlib import Path
from kl_vae.data import FolderSource, ImageDataset, batch_loader

class Slow(ImageDataset):
    def __getitem__(self, key):
        print("working", flush=True)
        time.sleep(60)

data = Slow(FolderSource(Path("."), ["a.png"], 3), 16, None, True, 0, True)
batches = iter(batch_loader(data, [[(0, 0, 0)]], 1, False, 60))
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="polled every five seconds")
def test_workers_end_when_the_main_process_is_killed() -> None:
    main = subprocess.Popen([sys.executable, "-c", ABANDONED], stdout=subprocess.PIPE, text=True)
    assert main.stdout is not None
    with main.stdout:
        assert main.stdout.readline() == "working\n"
        main.kill()
        killed = time.monotonic()
        assert main.stdout.read() == ""  # end of file when the worker has ended
        assert time.monotonic() - killed < 3.0
    main.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_the_limit_on_open_files_is_raised_or_named() -> None:
    code = (
        "import resource, sys; from kl_vae.data.loader import check_open_files\n"
        "soft, hard = map(int, sys.argv[1:])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "check_open_files(2)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    for limits, expected in (((64, 256), "(128, 256)"), ((130, 256), "(130, 256)")):
        command = [sys.executable, "-c", code, *map(str, limits)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == expected, done.stderr
    command = [sys.executable, "-c", code, "64", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert is_about(done.stderr.splitlines()[-1], "num_workers=2", 128, 64, "ulimit -n")
