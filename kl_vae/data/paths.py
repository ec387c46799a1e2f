"""Compact lists of relative paths, and fingerprints of files.

Shapes: N paths.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
from numpy.typing import NDArray


def name_bytes(path: str) -> bytes:
    """Return the bytes of a file name; unlike `os.fsencode`, independent of the locale."""
    return path.encode("utf-8", "surrogateescape")


class PathList(Sequence[str]):
    """Relative POSIX paths in one block of bytes, with an overhead of 8 bytes per path.

    A list of `str` has an overhead of 57 bytes per path. Forked workers also copy its memory pages,
    because reading a Python object writes its reference count.

    Args:
        block: the concatenated bytes of all paths.
        ends: int64 [N + 1], 0 followed by the end of each path in `block`.
    """

    def __init__(self, block: bytes, ends: NDArray[np.int64]) -> None:
        self.block = block
        self.ends = ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> PathList:
        """Return a list of these paths."""
        return cls.of_bytes([name_bytes(path) for path in paths])

    @classmethod
    def of_bytes(cls, names: Sequence[bytes]) -> PathList:
        """Return a list of paths, given as their `name_bytes`."""
        ends = np.zeros(len(names) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, names), np.int64, len(names)), out=ends[1:])
        return cls(b"".join(names), ends)

    def take(self, indices: NDArray[np.int64]) -> PathList:
        """Return the paths at these indices, in the order of the indices."""
        spans = zip(self.ends[indices].tolist(), self.ends[indices + 1].tolist(), strict=True)
        return self.of_bytes([self.block[start:end] for start, end in spans])

    def bytes_of_each(self) -> Iterator[bytes]:
        """Yield the `name_bytes` of each path."""
        ends = self.ends.data  # a memoryview converts to int lazily
        return (self.block[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PathList: ...
    def __getitem__(self, index: int | slice) -> str | PathList:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        number = range(len(self))[index]  # handles negative indices, raises IndexError
        return self.block[self.ends[number] : self.ends[number + 1]].decode(
            "utf-8", "surrogateescape"
        )

    def __iter__(self) -> Iterator[str]:
        return (name.decode("utf-8", "surrogateescape") for name in self.bytes_of_each())


def fingerprint(root: Path, paths: Sequence[str]) -> str:
    """Return a hash of relative paths, their order, and the file sizes: 32 hex digits.

    The size of a missing file, a broken link or a special file counts as -1.
    """
    return fingerprint_of(paths, (_size(os.path.join(root, path)) for path in paths))


def fingerprint_of(paths: Sequence[str], sizes: Iterable[int]) -> str:
    """Return a hash of relative paths, their order, and sizes in bytes: 32 hex digits."""
    names = paths.bytes_of_each() if isinstance(paths, PathList) else map(name_bytes, paths)
    digest = blake2b(digest_size=16)
    for name, size in zip(names, sizes, strict=True):
        digest.update(b"%s\0%d\n" % (name, size))
    return digest.hexdigest()


def file_state(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the size of a file as in `fingerprint`, and its modification time in ns."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0
    return file_size(status), status.st_mtime_ns


def hash_of(file: BinaryIO) -> str:
    """Return a hash of the content of an open file, from its position on: 32 hex digits.

    Raises:
        OSError: It cannot be read.
    """
    digest = blake2b(digest_size=16)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def file_size(status: os.stat_result) -> int:
    """Return the file size in bytes that `fingerprint` uses; -1 if not a regular file."""
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _size(path: str) -> int:
    return file_state(path)[0]
