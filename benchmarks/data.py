"""Images per second that the loader feeds, against torchvision's ImageFolder.

Both read the same files in a DataLoader of the same settings, one thread per process. Torchvision
gives float32 in [-1, 1]; ours gives uint8, which the device makes floats: that is measured as well.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import argument_parser, parse, report, rotated
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms

from kl_vae.data import ImageDataset, StepSampler, batch_loader, normalized, open_root

TORCHVISION = "torchvision"
COLUMNS = {
    "resized to": "{resize}",
    "workers": "{workers}",
    "": "{variant}",
    "images/s": "{rate:.0f}",
    "lowest to highest": "{low:.0f} to {high:.0f}",
    "ratio": "{ratio:.2f}",
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; return the rows."""
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--folder", type=Path, help="of images (default: random JPEGs, made here)")
    parser.add_argument("--images", type=int, default=512, help="of a pass (default: 512)")
    parser.add_argument("--size", type=int, default=512, help="of those made here (default: 512)")
    parser.add_argument("--crop", type=int, default=256, help="side, pixels (default: 256)")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=32)
    args = parse(parser, argv)
    torch.set_num_threads(1)

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)  # ImageFolder wants a folder of folders
        if args.folder is None:
            write_images(folder / "images", args.images, args.size)
        else:
            (folder / "images").symlink_to(args.folder.resolve(), target_is_directory=True)
        for resize in (args.crop, None):
            for workers in args.workers:
                rows += measure(folder, resize, workers, args)
    heading = (
        f"Crops of {args.crop} x {args.crop} in batches of {args.batch_size}, {args.repeats} "
        "passes of each, interleaved"
    )
    notes = ["Ratio: to torchvision's rate, the median over the rounds."]
    report(args, heading, COLUMNS, rows, notes)
    return rows


def write_images(folder: Path, number: int, size: int) -> None:
    """Write smooth random JPEGs of size x size pixels, 0000000.jpg and so on."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(number):
        pixels = rng.integers(0, 256, (size // 4 + 1, size // 4 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:07d}.jpg", quality=90)


def measure(folder: Path, resize: int | None, workers: int, args: Any) -> list[dict[str, Any]]:
    """Time the passes of each reader, interleaved."""
    # the first batches, one of each worker, are awaited and not counted: they hold the start
    awaited = max(1, workers)
    batches = max(2, args.images // args.batch_size) + awaited
    source = open_root(str(folder / "images"), 3)

    def own(*, draft: bool) -> Iterable[Any]:
        dataset = ImageDataset(
            source, args.crop, resize, flip=True, seed=0, training=True, draft=draft
        )
        sampler = StepSampler(
            len(source),
            args.batch_size,
            args.batch_size,
            0,
            1,
            seed=0,
            start_step=0,
            total_steps=batches,
        )
        return batch_loader(dataset, sampler, workers, pin_memory=False, timeout_seconds=0)

    def own_floats() -> Iterable[Any]:
        for batch in own(draft=False):
            yield normalized(batch.images.contiguous(memory_format=torch.channels_last))

    readers: dict[str, Callable[[], Iterable[Any]]] = {
        TORCHVISION: lambda: image_folder(folder, resize, workers, batches, args),
        "ours": partial(own, draft=False),
        "ours, and made floats here": own_floats,
    }
    if resize is not None:
        readers["ours, data.draft=true"] = partial(own, draft=True)

    rates: dict[str, list[float]] = {name: [] for name in readers}
    for repeat in range(args.repeats):
        for name in rotated(list(readers), repeat):
            running = iter(readers[name]())
            for _ in islice(running, awaited):
                pass
            start = time.perf_counter()
            counted = sum(1 for _ in running)
            rates[name].append(counted * args.batch_size / (time.perf_counter() - start))
            assert counted == batches - awaited
    return [
        {
            "resize": "as they are" if resize is None else str(resize),
            "workers": workers,
            "variant": name,
            "rate": statistics.median(each),
            "low": min(each),
            "high": max(each),
            "ratio": statistics.median(
                rate / theirs for rate, theirs in zip(each, rates[TORCHVISION], strict=True)
            ),
        }
        for name, each in rates.items()
    ]


def image_folder(
    folder: Path, resize: int | None, workers: int, batches: int, args: Any
) -> DataLoader[Any]:
    """Return torchvision's ImageFolder with the usual transforms, in random order."""
    steps: list[Any] = [] if resize is None else [transforms.Resize(resize)]
    steps += [transforms.RandomCrop(args.crop), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    dataset = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    number = batches * args.batch_size
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=RandomSampler(dataset, num_samples=number, generator=torch.Generator()),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),
    )


if __name__ == "__main__":
    main()
