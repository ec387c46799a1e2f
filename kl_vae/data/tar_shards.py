"""The images of tar shards, read at random.

N images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kl_vae.data.folder import chosen_by, image_extensions, with_extensions
from kl_vae.data.images import MAX_PIXELS, read_image_from, read_size_from
from kl_vae.data.paths import PathList, integers
from kl_vae.data.split import fingerprint_of
from kl_vae.data.tar_files import PartOf, RandomFiles
from kl_vae.data.tar_index import SIDECARS, index_shard, joined
from kl_vae.data.wanted import EVERYTHING, Wanted
from kl_vae.runtime.files import display_name

logger = logging.getLogger(__name__)

MAX_SIDECAR = 2**24  # bytes
_AT_ONCE = 8  # shards that are indexed: a network's file system is waited for most of the time


class TarSource:
    """Members of tar shards; made by `open_shards`.

    Args:
        files: the shards.
        keys: the members' names.
        shards: int32 [N], the number of each one's shard.
        spans: int64 [N,2], see `TarIndex`.
        sidecars: int64 [N,2,2], see `TarIndex`.
        channels: C.
        max_pixels: larger images are refused before they are decoded.
    """

    def __init__(
        self,
        files: RandomFiles,
        keys: PathList,
        shards: NDArray[np.int32],
        spans: NDArray[np.int64],
        sidecars: NDArray[np.int64],
        channels: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.keys = keys
        self.channels = channels
        self.max_pixels = max_pixels
        self._files = files
        self._shards = shards
        self._spans = spans
        self._sidecars = sidecars

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the members' names and sizes: as of a folder of them in this order."""
        return fingerprint_of(self.keys, integers(self._spans[:, 1]))

    def subset(self, indices: NDArray[np.int64]) -> TarSource:
        """Return the source of these images alone."""
        return TarSource(
            self._files,
            self.keys.take(indices),
            self._shards[indices],
            self._spans[indices],
            self._sidecars[indices],
            self.channels,
            self.max_pixels,
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    def read(self, index: int, wanted: Wanted = EVERYTHING) -> Tensor:
        """Decode a member into [C,H,W], uint8 or float32 in [0, 1]; see `read_image`."""

        def open_stream() -> BinaryIO:
            return self._open(index)

        return read_image_from(
            open_stream, self.name(index), self.channels, self.max_pixels, wanted
        )

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) from the image's header; see `read_size`."""
        return read_size_from(lambda: self._open(index), self.name(index))

    def name(self, index: int) -> str:
        """Return the shard's whole path and the member's name, printable."""
        return display_name(f"{self._files.files[self._shards[index]].path}/{self.keys[index]}")

    def key(self, index: int) -> str:
        """Return the member's name, which members of several shards may have."""
        return self.keys[index]

    def label_text(self, index: int) -> str | None:
        """Return what stands in `KEY.cls`, such as `17`; None where there is none.

        Raises:
            ValueError: it cannot be read.
        """
        return self.sidecar(index, ".cls")

    def sidecar(self, index: int, extension: str) -> str | None:
        """Return the text of `KEY.cls` or `KEY.json`; None where there is none.

        Raises:
            ValueError: it cannot be read, or is no text.
        """
        offset, size = self._sidecars[index, SIDECARS.index(extension)].tolist()
        if offset < 0:
            return None
        try:
            if size > MAX_SIDECAR:
                raise ValueError(f"{size} bytes are no label: pack it again")
            with self._files.open_part(self._shards[index], offset, size) as stream:
                return stream.read().decode().strip()
        except (OSError, ValueError) as error:  # UnicodeDecodeError is one
            raise ValueError(f"{self.name(index)}: its {extension}: {error}") from error

    def places(self) -> Iterator[str]:
        """Yield where each image is stored, the same for the same image of another source."""
        shards = [str(file.path.resolve()) for file in self._files.files]
        for shard, key in zip(self._shards.tolist(), self.keys, strict=True):
            yield f"{shards[shard]}/{key}"

    @property
    def files(self) -> list[Path]:
        """The shards."""
        return [file.path for file in self._files.files]

    def _open(self, index: int) -> BinaryIO:
        offset, size = self._spans[index].tolist()
        if offset < 0:
            raise ValueError(
                "not a regular file: pack what links lead to, with tar --dereference "
                "--hard-dereference"
            )
        return self._files.open_part(int(self._shards[index]), offset, size)


def open_shards(
    paths: Sequence[Path],
    channels: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    cache: bool = True,
) -> TarSource:
    """Open tar shards in the layout of WebDataset.

    The images are in the order of `paths` and, of a shard, of the file. Which members are images,
    and what the patterns mean, is as in `list_images`; hidden members are left out.

    Args:
        paths: the shards, one at least.
        channels: C.
        include: patterns of the members to take; none: all.
        exclude: patterns of the members to leave out.
        max_pixels: larger images are refused before they are decoded.
        cache: whether what is found in the shards may be kept for the next time.

    Raises:
        ValueError: a shard cannot be read, see `index_shard`; or there is no image.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        indices = list(pool.map(lambda path: index_shard(path, cache), paths))
    keys, spans, sidecars = joined(indices)
    shards = np.repeat(np.arange(len(paths), dtype=np.int32), [len(i.keys) for i in indices])
    extensions = image_extensions(channels, include)
    images = with_extensions(keys, extensions)
    where = display_name(paths[0])
    if len(paths) > 1:
        where += f" and {len(paths) - 1} more shards" if len(paths) > 2 else " and another shard"
    if not len(images):
        others = f"; of other images there are {len(keys)}" if len(keys) else ""
        raise ValueError(f"no images in {where}: looked for {', '.join(extensions)}{others}")
    chosen = chosen_by(keys, images, include, exclude, where)
    files = [PartOf(p, i.length, i.modified) for p, i in zip(paths, indices, strict=True)]
    logger.info("%d images in %d shards", len(chosen), len(paths))
    parts = (keys, shards, spans, sidecars)
    every = TarSource(RandomFiles(files), *parts, channels, max_pixels)
    return every if len(chosen) == len(keys) else every.subset(chosen)
