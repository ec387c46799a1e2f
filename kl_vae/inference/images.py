"""Images decoded ahead of the model that uses them.

C channels, H and W height and width.
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
    """An image, or why it cannot be used."""

    index: int  # in the source
    image: Tensor | None  # [C, H, W], float32 in [-1, 1]
    reason: str  # without the image's name; empty where there is an image


def load_images(
    source: Source,
    indices: Sequence[int],
    *,
    resize: int | None = None,
    crop: int | None = None,
    num_workers: int = 0,
) -> Generator[LoadedImage, None, None]:
    """Give images of a source in the order of `indices`, each of its own size.

    The processes are started by this call: to fork later, beside threads, would not be safe.

    Args:
        source: of the images.
        indices: which.
        resize: short side that images are resized to first, in pixels; None: as they are.
        crop: side of the square that is then cut out of the middle; None: the whole image.
        num_workers: processes that decode ahead, two images each; 0: this one, when asked.
    """
    num_workers = min(workers_that_fit(num_workers), len(indices))
    loader = DataLoader(
        _Prepared(source, resize, crop),
        sampler=indices,
        batch_size=None,  # one by one
        num_workers=num_workers,
        multiprocessing_context=START_METHOD if num_workers else None,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else the workers' seeds come from the global one
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
    """Yield this rank's units that are not done, each with its images, and show the progress.

    Args:
        source: of the images.
        units: the indices of the images of each unit.
        progress: knows which units are done.
        ranks: they share the units.
        resize: as in `load_images`.
        crop: as in `load_images`.
        num_workers: as in `load_images`.
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
    """Resize [C, H, W], uint8 or float32 in [0, 1], and cut a square out of its middle.

    The arguments are those of `load_images`.

    Raises:
        ValueError: the image is smaller than the crop, or too long and thin to be resized.
    """
    if resize is not None:
        image = resize_short_side(image, resize)
    if crop is None:
        return image
    height, width = image.shape[1:]
    if min(height, width) < crop:
        raise ValueError(f"{width} x {height} is smaller than the crop of {crop}; resize it")
    return center_crop(image, crop)


class _Pixels(NamedTuple):
    """What a worker hands over.

    Arrays go through a pipe, tensors through /dev/shm: in a container it holds 64 MB, less than
    one photograph, and each tensor there is an open file.
    """

    image: npt.NDArray[np.generic] | None  # [C, H, W], as decoded: a quarter of float32's size
    reason: str


class _Prepared(Dataset[_Pixels]):
    def __init__(self, source: Source, resize: int | None, crop: int | None) -> None:
        self._source = source
        self._resize = resize
        self._crop = crop

    def __getitem__(self, index: int) -> _Pixels:
        try:
            image = resize_and_crop(self._source.read(index), self._resize, self._crop)
        except ValueError as error:  # ImageError, or of resize and crop, which know no names
            reason = str(error).removeprefix(f"{self._source.name(index)}: ")
            return _Pixels(None, reason)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return _Pixels(None, "to decode it takes more memory than there is; leave it out")
        return _Pixels(np.ascontiguousarray(image.numpy()), "")


def _as_it_is(pixels: Any) -> Any:
    return pixels
