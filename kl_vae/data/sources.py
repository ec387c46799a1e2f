"""Image sources: the protocol, a folder of files, and the concatenation of sources."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kl_vae.data.decoding import (
    MAX_PIXELS,
    inspect_from,
    open_below,
    open_file,
    read_image_from,
    read_size_from,
    tiff_pages,
)
from kl_vae.data.paths import PathList, file_state, fingerprint, fingerprint_of, hash_of
from kl_vae.data.pixel_format import Inspected, PixelFormat
from kl_vae.data.pixels import WHOLE_IMAGE, Wanted
from kl_vae.runtime.files import display_name


class Source(Protocol):
    """A sequence of images before resizing and cropping.

    Attributes:
        pixel_format: how the files are read.
    """

    pixel_format: PixelFormat

    @property
    def channels(self) -> int:
        """Number of channels C of all images."""

    @property
    def fingerprint(self) -> str:
        """Hash of 32 hex digits that changes with the images."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, index: int, wanted: Wanted = WHOLE_IMAGE) -> Tensor:
        """Return the wanted region of an image [C,H,W], uint8 or float32 in [0, 1].

        Raises:
            ImageError: The image cannot be read.
        """

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image without decoding it."""

    def name(self, index: int) -> str:
        """Return the image's name in error messages."""

    def key(self, index: int) -> str:
        """Return the image's relative POSIX path, which names outputs and labels."""

    def label_text(self, index: int) -> str | None:
        """Return the label stored with the image, unparsed; None: no label."""

    def state(self, index: int) -> tuple[int, int]:
        """Return size (bytes; -1: no file) and modification time (ns) of the image's file."""

    def digest(self, index: int) -> str:
        """Return a hash of the stored image: 32 hex digits; empty: it cannot be read."""

    @property
    def files(self) -> list[Path]:
        """Files that contain the images; outputs must not overwrite them."""


class StoredSource(Source, Protocol):
    """A source of named images: files, or members of shards."""

    @property
    def keys(self) -> Sequence[str]:
        """The `key` of each image."""

    def subset(self, indices: NDArray[np.int64]) -> StoredSource:
        """Return a source of the images at these indices, in this order."""

    def places(self) -> Iterator[str]:
        """Yield the absolute location of each image, to find the same image in another source."""

    def inspect(self, index: int) -> Inspected:
        """Return what the file of an image states about its numbers.

        Raises:
            ImageError: The image cannot be read.
        """


class FolderSource:
    """Image files in a folder.

    Args:
        root: the folder.
        paths: POSIX paths relative to `root`.
        channels: C.
        max_pixels: maximum number of pixels, checked before decoding.
        sizes: int64 [N], size of each file in bytes, as in `Listing`, for `fingerprint`; None: read
            them when needed.
        pages: int64 [N], the page of each file that is the image; None: files are not split into
            pages.
        pixel_format: how the files are read.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        channels: int,
        max_pixels: int = MAX_PIXELS,
        sizes: NDArray[np.int64] | None = None,
        pages: NDArray[np.int64] | None = None,
        pixel_format: PixelFormat = PixelFormat(),  # noqa: B008
    ) -> None:
        self.root = root
        self.paths = paths
        self.channels = channels
        self.max_pixels = max_pixels
        self.sizes = sizes
        self.pages = pages
        self.pixel_format = pixel_format

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the relative paths and file sizes: 32 hex digits."""
        if self.sizes is None:
            return fingerprint(self.root, self.paths)
        return fingerprint_of(self.paths, self.sizes.data)

    @property
    def keys(self) -> Sequence[str]:
        """Paths relative to the root; see `key`."""
        return self.paths if self.pages is None else [self.key(i) for i in range(len(self))]

    def subset(self, indices: NDArray[np.int64]) -> FolderSource:
        """Return a source of the files at these indices, in this order."""
        paths = self.paths if isinstance(self.paths, PathList) else PathList.of(self.paths)
        return FolderSource(
            self.root,
            paths.take(indices),
            self.channels,
            self.max_pixels,
            sizes=None if self.sizes is None else self.sizes[indices],
            pages=None if self.pages is None else self.pages[indices],
            pixel_format=self.pixel_format,
        )

    def split_into_pages(self) -> FolderSource:
        """Return a source in which each page of a file is an image."""
        pages = [tiff_pages(self.root / path) for path in self.paths]
        counts = [len(numbers) for numbers in pages]
        split = self.subset(np.repeat(np.arange(len(self)), counts))
        split.pages = np.array([page for numbers in pages for page in numbers], np.int64)
        return split

    def places(self) -> Iterator[str]:
        """Yield the absolute path of each file; links in the root are resolved."""
        root = os.path.realpath(self.root)
        for path in self.paths:
            yield f"{root}/{path}"

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def read(self, index: int, wanted: Wanted = WHOLE_IMAGE) -> Tensor:
        """Decode a file into [C,H,W], uint8 or float32 in [0, 1]; see `read_image`."""
        pixel_format = self.pixel_format
        if self.pages is not None:
            pixel_format = pixel_format._replace(page=int(self.pages[index]))
        return read_image_from(
            partial(self._open, index),
            self._file_name(index),
            self.channels,
            self.max_pixels,
            wanted,
            pixel_format,
        )

    def inspect(self, index: int) -> Inspected:
        """Return what a file states about its numbers."""
        return inspect_from(partial(self._open, index), self._file_name(index), self.max_pixels)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) from the file's header; see `read_size`."""
        return read_size_from(partial(self._open, index), self._file_name(index))

    def _open(self, index: int) -> BinaryIO:
        return open_below(self.root, partial(open_file, self.root / self.paths[index]))

    def _file_name(self, index: int) -> str:
        return display_name(self.root / self.paths[index])

    def name(self, index: int) -> str:
        """Return the path of the file, printable, and its page."""
        return display_name(self.root / self.key(index))

    def key(self, index: int) -> str:
        """Return the path of the file relative to the root, and its page, such as `a.page2.tif`."""
        if self.pages is None or not self.pages[index]:
            return self.paths[index]
        stem, extension = os.path.splitext(self.paths[index])
        return f"{stem}.page{self.pages[index] + 1}{extension}"

    def label_text(self, index: int) -> str | None:
        """Return None: image files have no stored labels."""
        return None

    def state(self, index: int) -> tuple[int, int]:
        """Return size (bytes; -1: no file) and modification time (ns) of the file."""
        return file_state(self.root / self.paths[index])

    def digest(self, index: int) -> str:
        """Return a hash of the file; empty: it cannot be read."""
        try:
            with open(self.root / self.paths[index], "rb") as file:
                return hash_of(file)
        except OSError:
            return ""

    @property
    def files(self) -> list[Path]:
        """Paths of the files."""
        return [self.root / path for path in self.paths]


class JoinedSource:
    """Concatenation of sources with the same number of channels."""

    def __init__(self, parts: Sequence[StoredSource]) -> None:
        self.parts = tuple(parts)
        self.channels = self.parts[0].channels
        self.pixel_format = self.parts[0].pixel_format
        self._ends = list(accumulate(map(len, self.parts)))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the fingerprints of the parts: 32 hex digits."""
        text = " ".join(part.fingerprint for part in self.parts)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def files(self) -> list[Path]:
        """Files that contain the images."""
        return [file for part in self.parts for file in part.files]

    def __len__(self) -> int:
        """Return the number of images."""
        return self._ends[-1]

    def read(self, index: int, wanted: Wanted = WHOLE_IMAGE) -> Tensor:
        """Return the wanted region of an image [C,H,W]."""
        part, local_index = self._find(index)
        return part.read(local_index, wanted)

    def inspect(self, index: int) -> Inspected:
        """Return what the file of an image states about its numbers."""
        part, local_index = self._find(index)
        return part.inspect(local_index)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image without decoding it."""
        part, local_index = self._find(index)
        return part.size(local_index)

    def name(self, index: int) -> str:
        """Return the image's name in error messages."""
        part, local_index = self._find(index)
        return part.name(local_index)

    def key(self, index: int) -> str:
        """Return the image's relative path in its part; it may not be unique."""
        part, local_index = self._find(index)
        return part.key(local_index)

    def label_text(self, index: int) -> str | None:
        """Return the label stored with the image, unparsed; None: no label."""
        part, local_index = self._find(index)
        return part.label_text(local_index)

    def state(self, index: int) -> tuple[int, int]:
        """Return size and modification time of an image's file."""
        part, local_index = self._find(index)
        return part.state(local_index)

    def digest(self, index: int) -> str:
        """Return a hash of the stored image."""
        part, local_index = self._find(index)
        return part.digest(local_index)

    def _find(self, index: int) -> tuple[StoredSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def with_format(source: StoredSource, pixel_format: PixelFormat) -> StoredSource:
    """Return a source that reads its files in this format; pages may become images.

    Raises:
        ValueError: pages of files in tar shards cannot become images.
    """
    source.pixel_format = pixel_format
    if pixel_format.pages != "images":
        return source
    if not isinstance(source, FolderSource):
        raise ValueError("pages=images: tar shards have no pages; unpack them, or choose another")
    return source.split_into_pages()
