"""Where a data set's images come from: what a source must know."""

from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import Tensor

from kl_vae.data.images import MAX_PIXELS, display_name, read_image, read_size
from kl_vae.data.split import fingerprint


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

    def read(self, index: int) -> Tensor:
        """Return [C,H,W], uint8 or float32 in [0, 1]; ImageError where that cannot be."""

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) without decoding."""

    def name(self, index: int) -> str:
        """Return what an error calls the image."""

    def key(self, index: int) -> str:
        """Return the image's relative POSIX path, by which outputs are named and labelled."""

    @property
    def files(self) -> list[Path]:
        """The files that hold the images, which no output may replace."""


class FolderSource:
    """The files `paths`, relative to the folder `root`."""

    def __init__(
        self, root: Path, paths: list[str], channels: int, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.root = root
        self.paths = paths
        self.channels = channels
        self.max_pixels = max_pixels

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the relative paths and the files' sizes."""
        return fingerprint(self.root, self.paths)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        """Decode a file into [C,H,W], uint8 or float32 in [0, 1]; see `read_image`."""
        return read_image(self.root / self.paths[index], self.channels, self.max_pixels)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) from the file's header; see `read_size`."""
        return read_size(self.root / self.paths[index])

    def name(self, index: int) -> str:
        """Return the file's whole path, printable."""
        return display_name(self.root / self.paths[index])

    def key(self, index: int) -> str:
        """Return the file's path, relative to the root."""
        return self.paths[index]

    @property
    def files(self) -> list[Path]:
        """The files themselves."""
        return [self.root / path for path in self.paths]
