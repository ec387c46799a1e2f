"""Loading of images in worker processes, ahead of the model.

Shapes: C channels, H and W height and width.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kl_vae.data import Source, center_crop, resize_short_side, to_float
from kl_vae.data.loader import START_METHOD, start_worker, workers_that_fit
from kl_vae.inference.progress import Progress, show_progress
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.memory import is_out_of_memory


@dataclass(frozen=True)
class LoadedImage:
    """An image, or the reason why it cannot be used."""

    index: int  # position in the source
    image: Tensor | None  # [C, H, W], float32 in [-1, 1]
    reason: str  # without the name of the image; empty on success


def load_images(
    source: Source,
    indices: Sequence[int],
    *,
    resize: int | None = None,
    crop: int | None = None,
    num_workers: int = 0,
) -> Generator[LoadedImage, None, None]:
    """Load images in the order of `indices`, without batching.

    The worker processes start in this call, since a later fork is unsafe once threads exist.

    Args:
        source: source of the images.
        indices: positions of the images in the source.
        resize: resize the short side of each image to this many pixels; None: no resizing.
        crop: side of the centre crop in pixels, after resizing; None: no crop.
        num_workers: number of processes, each of which decodes two images ahead; 0: decode in this
            process on demand.
    """
    num_workers = min(workers_that_fit(num_workers), len(indices))
    loader = DataLoader(
        _Prepared(source, resize, crop),
        sampler=indices,
        batch_size=None,  # no batching
        num_workers=num_workers,
        multiprocessing_context=START_METHOD if num_workers else None,
        collate_fn=_identity,
        generator=torch.Generator(),  # keeps worker seeds from advancing the global generator
        worker_init_fn=partial(start_worker, parent=os.getpid()),
    )
    return _loaded(indices, iter(loader))


def _loaded(
    indices: Sequence[int], prepared: Iterator[_Pixels]
) -> Generator[LoadedImage, None, None]:
    for index, (pixels, reason) in zip(indices, prepared, strict=True):
        image = None if pixels is None else to_float(torch.from_numpy(pixels))
        yield LoadedImage(index, image, reason)


@contextmanager
def loaded_units(
    source: Source,
    units: Sequence[range],
    progress: Progress,
    ranks: Ranks,
    *,
    resize: int | None,
    crop: int | None,
    num_workers: int,
) -> Iterator[Iterator[tuple[int, Iterator[LoadedImage]]]]:
    """Load the images of this rank's unfinished units and show the progress.

    Args:
        source: source of the images.
        units: indices of the images of each unit.
        progress: records of the finished units.
        ranks: the ranks that share the units.
        resize: see `load_images`.
        crop: see `load_images`.
        num_workers: see `load_images`.

    Yields:
        An iterator of units, each with an iterator of its images.
    """
    own = progress.share(len(units))
    indices = [index for unit in own for index in units[unit]]
    images = load_images(source, indices, resize=resize, crop=crop, num_workers=num_workers)
    with closing(images), show_progress(len(indices), ranks) as update:

        def counted() -> Iterator[LoadedImage]:
            for image in images:
                yield image
                update(1)

        read = counted()
        yield ((unit, islice(read, len(units[unit]))) for unit in own)


def resize_and_crop(image: Tensor, resize: int | None, crop: int | None) -> Tensor:
    """Resize and centre-crop an image [C, H, W], uint8 or float32 in [0, 1].

    See `load_images` for `resize` and `crop`.

    Raises:
        ValueError: the image is smaller than the crop, or its aspect ratio is too extreme.
    """
    if resize is not None:
        image = resize_short_side(image, resize)
    if crop is None:
        return image
    height, width = image.shape[1:]
    if min(height, width) < crop:
        raise ValueError(f"{width} x {height} is smaller than the crop of {crop}; resize the image")
    return center_crop(image, crop)


class _Pixels(NamedTuple):
    """Result of a worker process.

    Arrays are sent through a pipe. Tensors would be sent through /dev/shm, which holds only 64 MB
    in a container, and each tensor would keep a file open.
    """

    image: npt.NDArray[np.generic] | None  # [C, H, W], as decoded: uint8 is 1/4 of float32
    reason: str


class _Prepared(Dataset[_Pixels]):
    def __init__(self, source: Source, resize: int | None, crop: int | None) -> None:
        self._source = source
        self._resize = resize
        self._crop = crop

    def __getitem__(self, index: int) -> _Pixels:
        try:
            image = resize_and_crop(self._source.read(index), self._resize, self._crop)
        except ValueError as error:  # ImageError, or an error of resize or crop without a name
            reason = str(error).removeprefix(f"{self._source.name(index)}: ")
            return _Pixels(None, reason)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return _Pixels(None, "not enough memory to decode the image; exclude it")
        return _Pixels(np.ascontiguousarray(image.numpy()), "")


def _identity(pixels: Any) -> Any:
    return pixels
