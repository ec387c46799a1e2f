"""Read parts of many files at random, in each process with descriptors of its own."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAX_OPEN = 64  # files of one process; the system's limit is often 1024 for all that it has open
BUFFER = 2**18  # bytes: most images are read at once


class PartOf(NamedTuple):
    """A file of which parts are read, as it has to be."""

    path: Path
    length: int  # bytes
    modified: int  # st_mtime_ns


class RandomFiles:
    """Open files, the last that were used, which can be sent to other processes.

    A worker that was forked opens them anew; so does one that gets this pickled.
    """

    def __init__(self, files: Sequence[PartOf]) -> None:
        self.files = tuple(files)
        self._start()

    def open_part(self, number: int, offset: int, size: int) -> io.BufferedReader:
        """Return a stream of `size` bytes of file `number` from `offset` on; close it.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it has changed.
        """
        part = _Part(self._descriptor(number), offset, size)
        return io.BufferedReader(part, max(1, min(size, BUFFER)))

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.files = state["files"]
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()

    def _descriptor(self, number: int) -> _Descriptor:
        if self._process != os.getpid():
            self._start()  # the lock, too: another thread may have held it at the fork
        with self._lock:
            descriptor = self._open.pop(number, None)
            if descriptor is None:
                descriptor = _Descriptor(self.files[number])
                if len(self._open) >= MAX_OPEN:
                    self._open.popitem(last=False)
            self._open[number] = descriptor
        return descriptor


class _Descriptor:
    """An open file; closed when nobody uses it any more."""

    def __init__(self, file: PartOf) -> None:
        self.number = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        status = os.fstat(self.number)
        if (status.st_size, status.st_mtime_ns) != (file.length, file.modified):
            raise ValueError("the shard has changed since it was listed: start the command again")

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _Part(io.RawIOBase):
    """A part of a file as a stream, read without moving the file's own position."""

    def __init__(self, descriptor: _Descriptor, offset: int, size: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(f"a position of {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))
        content = os.pread(self._descriptor.number, wanted, self._offset + self._position)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
