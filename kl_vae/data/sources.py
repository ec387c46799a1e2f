"""Where a data set's images come from: what a source must know, a folder, and several as one."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kl_vae.data.decoding import MAX_PIXELS, read_image, read_size
from kl_vae.data.paths import PathList, fingerprint, fingerprint_of
from kl_vae.data.pixels import EVERYTHING, Wanted
from kl_vae.runtime.files import display_name


class Source(Protocol):
    """A numbered sequence of images, not yet resized or cropped."""

    @property
    def channels(self) -> int:
        """C of every image."""

    @property
    def fingerprint(self) -> str:
        """32 hex digits that change when the images do."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, index: int, wanted: Wanted = EVERYTHING) -> Tensor:
        """Return the wanted part of [C,H,W], uint8 or float32 in [0, 1].

        Raises:
            ImageError: the image cannot be used.
        """

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) without decoding."""

    def name(self, index: int) -> str:
        """Return the image's name in errors."""

    def key(self, index: int) -> str:
        """Return the image's relative POSIX path, by which outputs are named and labelled."""

    def label_text(self, index: int) -> str | None:
        """Return the label that is stored with the image, as it is there; None: there is none."""

    @property
    def files(self) -> list[Path]:
        """The files that hold the images, which no output may replace."""


class StoredSource(Source, Protocol):
    """A source whose images have names that were given to them: files, or members of shards."""

    @property
    def keys(self) -> Sequence[str]:
        """The `key` of every image."""

    def subset(self, indices: NDArray[np.int64]) -> StoredSource:
        """Return the source of these images alone, in this order."""

    def places(self) -> Iterator[str]:
        """Yield where each image is stored, the same for the same image of another source."""


class FolderSource:
    """The files `paths`, relative to the folder `root`.

    Args:
        root: the folder.
        paths: relative POSIX paths.
        channels: C.
        max_pixels: larger images are refused before they are decoded.
        sizes: int64, bytes of each file where they are known, as in `Listing`; for `fingerprint`.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        channels: int,
        max_pixels: int = MAX_PIXELS,
        sizes: NDArray[np.int64] | None = None,
    ) -> None:
        self.root = root
        self.paths = paths
        self.channels = channels
        self.max_pixels = max_pixels
        self.sizes = sizes

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the relative paths and the files' sizes."""
        if self.sizes is None:
            return fingerprint(self.root, self.paths)
        return fingerprint_of(self.paths, self.sizes.data)

    @property
    def keys(self) -> Sequence[str]:
        """The paths, relative to the root."""
        return self.paths

    def subset(self, indices: NDArray[np.int64]) -> FolderSource:
        """Return the source of these files alone, in this order."""
        paths = self.paths if isinstance(self.paths, PathList) else PathList.of(self.paths)
        sizes = None if self.sizes is None else self.sizes[indices]
        return FolderSource(self.root, paths.take(indices), self.channels, self.max_pixels, sizes)

    def places(self) -> Iterator[str]:
        """Yield each file's whole path; links to the root are followed."""
        root = os.path.realpath(self.root)
        for path in self.paths:
            yield f"{root}/{path}"

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def read(self, index: int, wanted: Wanted = EVERYTHING) -> Tensor:
        """Decode a file into [C,H,W], uint8 or float32 in [0, 1]; see `read_image`."""
        path = self.root / self.paths[index]
        return read_image(path, self.channels, self.max_pixels, wanted)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) from the file's header; see `read_size`."""
        return read_size(self.root / self.paths[index])

    def name(self, index: int) -> str:
        """Return the file's whole path, printable."""
        return display_name(self.root / self.paths[index])

    def key(self, index: int) -> str:
        """Return the file's path, relative to the root."""
        return self.paths[index]

    def label_text(self, index: int) -> str | None:
        """None: a folder's files have no labels beside them."""
        return None

    @property
    def files(self) -> list[Path]:
        """The files themselves."""
        return [self.root / path for path in self.paths]


class JoinedSource:
    """The images of one source after those of another; all have the same channels."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self.channels = self.parts[0].channels
        self._ends = list(accumulate(map(len, self.parts)))

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the parts' fingerprints."""
        text = " ".join(part.fingerprint for part in self.parts)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def files(self) -> list[Path]:
        """The files that hold the images."""
        return [file for part in self.parts for file in part.files]

    def __len__(self) -> int:
        """Return the number of images."""
        return self._ends[-1]

    def read(self, index: int, wanted: Wanted = EVERYTHING) -> Tensor:
        """Return the wanted part of [C,H,W]."""
        part, own = self._find(index)
        return part.read(own, wanted)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) without decoding."""
        part, own = self._find(index)
        return part.size(own)

    def name(self, index: int) -> str:
        """Return the image's name in errors."""
        part, own = self._find(index)
        return part.name(own)

    def key(self, index: int) -> str:
        """Return the image's relative path in its part; two parts may have the same."""
        part, own = self._find(index)
        return part.key(own)

    def label_text(self, index: int) -> str | None:
        """Return the label that is stored with the image; None: there is none."""
        part, own = self._find(index)
        return part.label_text(own)

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)
