"""What the loader feeds, against torchvision's ImageFolder with the usual transforms.

Both read the same files in a `DataLoader` of the same settings. Torchvision gives float32 in
[-1, 1], ours gives uint8, which the device makes floats; what that takes here is measured as well.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from kl_vae.data import (
    Batch,
    FolderSource,
    ImageDataset,
    StepSampler,
    Wanted,
    batch_loader,
    open_root,
    resize_short_side,
)
from kl_vae.data.dataset import DRAFT_MARGIN
from kl_vae.data.loader import START_METHOD
from kl_vae.training.step import to_device

CHANNELS = 3  # ImageFolder gives no other
OURS = "ours"
FLOATS = "ours, and made floats here"
DRAFTED = "ours, data.draft=true"
THEIRS = "torchvision"
_COMPARED = 64  # images of which it is said what `draft` changes


@dataclass(frozen=True)
class Loading:
    """How crops are made and loaded.

    Attributes:
        crop: side in pixels.
        batch_size: images a batch.
        images: about how many a pass reads, whole batches.
    """

    crop: int
    batch_size: int
    images: int

    def batches(self, workers: int) -> int:
        """Batches of a pass: those that are awaited before the clock starts, and two or more."""
        return max(2, self.images // self.batch_size) + max(1, workers)


@dataclass(frozen=True)
class Feed:
    """Images a second of each pass, in the order of the rounds, by who read them.

    Attributes:
        resize: short side before the crop, in pixels; None: as the images are.
        workers: processes; 0: that which asks.
        rates: images a second.
        draft_psnr: dB, of what `draft` gives against decoding whole; None: it changes nothing.
    """

    resize: int | None
    workers: int
    rates: dict[str, list[float]]
    draft_psnr: float | None = None

    def ratio(self, name: str) -> float:
        """Median over the rounds of how many times torchvision's images are read."""
        pairs = zip(self.rates[name], self.rates[THEIRS], strict=True)
        return statistics.median(own / theirs for own, theirs in pairs)

    def rows(self) -> Iterator[str]:
        """Rows of the table."""
        resize = "as they are" if self.resize is None else str(self.resize)
        for name, rates in self.rates.items():
            middle = f"{statistics.median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f}"
            yield f"| {resize} | {self.workers} | {name} | {middle} | {self.ratio(name):.2f} |"


def table(feeds: Sequence[Feed]) -> str:
    """A Markdown table, and below it what `draft` changes."""
    head = "| resized to | workers | | images/s | lowest to highest | ratio |"
    notes = {
        feed.resize: f"\nResized to {feed.resize}, crops by draft have {feed.draft_psnr:.1f} dB "
        "PSNR against those of JPEGs that are decoded whole."
        for feed in feeds
        if feed.draft_psnr is not None
    }
    rows = [row for feed in feeds for row in feed.rows()]
    return "\n".join([head, "|---|---|---|---|---|---|", *rows, *notes.values()])


@contextmanager
def folder_of(pictures: Path | None, number: int, size: int) -> Iterator[Path]:
    """Give a folder of folders, as ImageFolder wants it: of `pictures`, else of random ones."""
    from kl_vae.benchmark.latents import write_pictures

    with tempfile.TemporaryDirectory() as name:
        inner = Path(name, "images")
        if pictures is None:
            write_pictures(inner, number, size, CHANNELS)
        else:
            inner.symlink_to(pictures.resolve(), target_is_directory=True)
        yield Path(name)


def compare_feeds(
    folder: Path,
    loading: Loading,
    resizes: Sequence[int | None],
    workers: Sequence[int],
    repeats: int,
) -> list[Feed]:
    """Measure passes by turns, with one thread a process, for each `resize` and number of workers.

    The first batches of a pass, one of each worker, are awaited and not counted: they have taken
    the start of the workers.

    Raises:
        ValueError: there are tar shards, fewer images than a batch holds, or smaller than a crop.
    """
    source = _source(folder)
    _sampler(source, loading, 0)  # or an error before anything is measured
    feeds = []
    with _one_thread():
        for resize in resizes:
            ImageDataset(source, loading.crop, resize, False, 0, training=True).check_sizes()
            psnr = None if resize is None else _draft_psnr(source, resize)
            for number in workers:
                passes = _passes(folder, source, loading, resize, number)
                if psnr is None:  # it would be the same once more
                    del passes[DRAFTED]
                feeds.append(Feed(resize, number, _by_turns(passes, repeats), psnr))
    return feeds


def _by_turns(passes: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    names = list(passes)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)  # none always follows the same one
        for name in names[first:] + names[:first]:
            rates[name].append(passes[name]())
    return rates


def _draft_psnr(source: FolderSource, resize: int) -> float | None:
    """Of some images; None: not one is so large that it is decoded smaller."""
    squares, values = 0.0, 0
    for index in range(min(len(source), _COMPARED)):
        whole = resize_short_side(source.read(index), resize)
        drafted = resize_short_side(source.read(index, Wanted(DRAFT_MARGIN * resize)), resize)
        squares += (whole.double() - drafted.double()).square().sum().item()
        values += whole.numel()
    return 10.0 * math.log10(255.0**2 * values / squares) if squares else None


def _source(folder: Path) -> FolderSource:
    source = open_root(str(folder / "images"), CHANNELS)
    if not isinstance(source, FolderSource):
        raise ValueError("there are tar shards, which ImageFolder cannot read: give pictures")
    return source


def _passes(
    folder: Path, source: FolderSource, loading: Loading, resize: int | None, workers: int
) -> dict[str, Callable[[], float]]:
    def ours(draft: bool = False, floats: bool = False) -> float:
        dataset = ImageDataset(
            source, loading.crop, resize, flip=True, seed=0, training=True, draft=draft
        )
        sampler = _sampler(source, loading, workers)
        loader = batch_loader(dataset, sampler, workers, pin_memory=False, timeout_seconds=0)
        return _rate(map(_arrived, loader) if floats else loader, loading, workers)

    def theirs() -> float:
        return _rate(_image_folder(folder, loading, resize, workers), loading, workers)

    return {
        THEIRS: theirs,
        OURS: ours,
        FLOATS: partial(ours, floats=True),
        DRAFTED: partial(ours, draft=True),
    }


def _sampler(source: FolderSource, loading: Loading, workers: int) -> StepSampler:
    size = loading.batch_size
    return StepSampler(
        len(source), size, size, 0, 1, seed=0, start_step=0, total_steps=loading.batches(workers)
    )


def _arrived(batch: Batch) -> Tensor:
    return to_device(batch.images, torch.device("cpu"), channels_last=True)


def _image_folder(
    folder: Path, loading: Loading, resize: int | None, workers: int
) -> DataLoader[Any]:
    from torchvision import datasets, transforms  # takes as long to import as torch

    steps: list[Any] = [] if resize is None else [transforms.Resize(resize)]
    steps += [transforms.RandomCrop(loading.crop), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    dataset = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    images = loading.batches(workers) * loading.batch_size
    return DataLoader(
        dataset,
        batch_size=loading.batch_size,
        sampler=RandomSampler(dataset, num_samples=images, generator=torch.Generator()),
        num_workers=workers,
        multiprocessing_context=START_METHOD if workers else None,
        generator=torch.Generator(),
    )


def _rate(batches: Iterable[object], loading: Loading, workers: int) -> float:
    """Images a second."""
    awaited, running = max(1, workers), iter(batches)
    for _ in islice(running, awaited):
        pass
    start = time.perf_counter()
    counted = sum(1 for _ in running)
    seconds = time.perf_counter() - start
    assert counted == loading.batches(workers) - awaited
    return counted * loading.batch_size / seconds


@contextmanager
def _one_thread() -> Iterator[None]:
    """As a worker has: what is measured without workers is what a core does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
