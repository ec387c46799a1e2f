"""Sizes of images, read from the headers of all files before a run starts.

Shapes: N images.
"""

from __future__ import annotations

import logging
import os
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from kl_vae.data.config import DataConfig
from kl_vae.data.dataset import ImageDataset
from kl_vae.data.decoding import ImageError
from kl_vae.data.loader import START_METHOD, start_worker, workers_that_fit
from kl_vae.data.sources import Source
from kl_vae.data.transforms import as_written, height_and_width, resized_sides

logger = logging.getLogger(__name__)

_BATCH = 1000  # headers that a process reads at once: about 0.1 s


def read_sizes(source: Source, num_workers: int = 0) -> NDArray[np.int64]:
    """Return the (height, width) of each image, int64 [N,2]; zeros where no header can be read.

    Args:
        source: the images.
        num_workers: number of processes that read the headers, if they are many.
    """
    workers = 0
    if len(source) > _BATCH:
        logger.info("reading the sizes of %d images", len(source))
        workers = workers_that_fit(num_workers)
    loader = DataLoader(
        _Headers(source),
        batch_size=_BATCH,
        num_workers=workers,
        multiprocessing_context=START_METHOD if workers else None,
        collate_fn=np.array,
        generator=torch.Generator(),  # keeps the loader from drawing from the global generator
        worker_init_fn=partial(start_worker, parent=os.getpid()),
    )
    return np.concatenate([np.empty((0, 2), np.int64), *loader])


class _Headers(Dataset[tuple[int, int]]):
    """The (height, width) of each image of a source."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, int]:
        try:
            return self._source.size(index)
        except ImageError:  # reported when the image is read
            return 0, 0


def check_sizes(dataset: ImageDataset, config: DataConfig, part: str) -> NDArray[np.int64]:
    """Return the indices of the images that `config.min_size` does not skip, and report the sizes.

    One line each reports the images that are smaller, that are enlarged by `resize`, and that have
    too many pixels. Images without a readable header are kept: reading them is an error.

    Args:
        dataset: the images.
        config: the configuration `data`.
        part: training or validation, for the messages.

    Raises:
        ValueError: An image is smaller than the crop, no image is large enough, or too many
            images have too many pixels.
    """
    sizes = read_sizes(dataset.source, config.num_workers)
    readable = sizes.min(axis=1) > 0

    def some(chosen: NDArray[np.bool_]) -> str:
        """Describe the chosen images: their number, and the smallest one."""
        index = int(np.flatnonzero(chosen)[sizes[chosen].min(axis=1).argmin()])
        height, width = sizes[index].tolist()
        of = f"{int(chosen.sum())} of {len(sizes)} {part} images"
        return f"{of}, such as {dataset.source.name(index)} ({width} x {height})"

    kept = np.ones(len(sizes), np.bool_)
    if config.min_size is not None:
        kept = ~readable | (sizes >= height_and_width(config.min_size)).all(axis=1)
        shown = as_written(config.min_size)
        if not kept.any():
            raise ValueError(
                f"data.min_size={shown}: no image is that large; lower it (smaller: {some(~kept)})"
            )
        if not kept.all():
            logger.info("data.min_size=%s: skipped as smaller: %s", shown, some(~kept))
    shapes = sizes
    if dataset.resize is not None:
        short = np.where(readable, sizes.min(axis=1), dataset.resize)
        enlarged = kept & (short < dataset.resize)
        if enlarged.any():
            logger.warning(
                "data.resize=%d: enlarges %s, by a factor of up to %.3g",
                dataset.resize,
                some(enlarged),
                dataset.resize / int(short[enlarged].min()),
            )
        shapes = np.stack(resized_sides(sizes[:, 0], sizes[:, 1], short, dataset.resize), axis=1)
    small = kept & readable & (shapes < dataset.crop_size).any(axis=1)
    if small.any():
        fix = "set data.resize" if dataset.resize is None else "increase data.resize"
        raise ValueError(
            f"smaller than the crop of {as_written(dataset.crop)}: {some(small)}; {fix}, skip them "
            "with data.min_size, or lower data.crop"
        )
    large = kept & (sizes.prod(axis=1) > config.max_pixels)
    if large.any():
        text = f"data.max_pixels={config.max_pixels}: {some(large)} have more pixels"
        if large.sum() > config.max_bad_fraction * kept.sum():
            raise ValueError(
                f"{text}, more than data.max_bad_fraction={config.max_bad_fraction}; increase one "
                "of the two, or exclude them"
            )
        logger.warning("%s; they are replaced as bad images", text)
    return np.flatnonzero(kept)
