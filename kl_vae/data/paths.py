"""Many relative paths in little memory.

N paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

_CHUNK = 2**16  # what there is of Python's objects at a time


def name_bytes(path: str) -> bytes:
    """Return the bytes of a file's name; unlike `os.fsencode`, whatever the locale."""
    return path.encode("utf-8", "surrogateescape")


def name_text(name: bytes) -> str:
    """Return the text whose `name_bytes` are these."""
    return name.decode("utf-8", "surrogateescape")


def integers(array: NDArray[np.integer]) -> Iterator[int]:
    """Yield the numbers of an array [N], of which few are Python's at a time."""
    for first in range(0, len(array), _CHUNK):
        yield from array[first : first + _CHUNK].tolist()


class PathList(Sequence[str]):
    """Relative POSIX paths as one block of bytes: a path takes 8 bytes more than its own.

    A list of as many `str` takes 57 more, and a worker process that reads it copies it page by
    page, since each look at a Python object writes its count of references.

    Args:
        block: the bytes of all paths, one after the other.
        ends: int64 [N + 1]: 0, and where in `block` each path ends.
    """

    def __init__(self, block: bytes, ends: NDArray[np.int64]) -> None:
        self.block = block
        self.ends = ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> PathList:
        """The paths of any iterable."""
        return cls.of_bytes([name_bytes(path) for path in paths])

    @classmethod
    def of_bytes(cls, names: Sequence[bytes]) -> PathList:
        """The paths whose `name_bytes` these are."""
        ends = np.zeros(len(names) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, names), np.int64, len(names)), out=ends[1:])
        return cls(b"".join(names), ends)

    @classmethod
    def joined(cls, parts: Sequence[PathList]) -> PathList:
        """The paths of one list after those of another."""
        starts = np.cumsum([0, *(len(part.block) for part in parts)])
        ends = [part.ends[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(
            b"".join(part.block for part in parts), np.concatenate([np.zeros(1, np.int64), *ends])
        )

    @property
    def nbytes(self) -> int:
        """What it takes of memory."""
        return len(self.block) + self.ends.nbytes

    def take(self, indices: NDArray[np.int64]) -> PathList:
        """The paths of these numbers, in their order."""
        ends = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(np.diff(self.ends)[indices], out=ends[1:])
        blocks = []
        for first in range(0, len(indices), _CHUNK):
            some = indices[first : first + _CHUNK]
            spans = zip(self.ends[:-1][some].tolist(), self.ends[1:][some].tolist(), strict=True)
            blocks.append(b"".join([self.block[start:end] for start, end in spans]))
        return PathList(b"".join(blocks), ends)

    def bytes_of_each(self) -> Iterator[bytes]:
        """The `name_bytes` of each path."""
        start = 0
        for end in integers(self.ends[1:]):
            yield self.block[start:end]
            start = end

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PathList: ...
    def __getitem__(self, index: int | slice) -> str | PathList:
        if isinstance(index, slice):
            return self.take(np.array(range(len(self))[index], np.int64))
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        return name_text(self.block[self.ends[number] : self.ends[number + 1]])

    def __iter__(self) -> Iterator[str]:
        return map(name_text, self.bytes_of_each())

    def __repr__(self) -> str:
        return f"PathList({len(self)} paths)"
