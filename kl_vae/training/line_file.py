"""A text file that lines are appended to, and that outlives a full disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


class LineFile:
    """Appends lines; those that cannot be written yet are kept and written with a later one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[str] = []
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # closed by `close`
        self._length = os.fstat(self._file.fileno()).st_size  # of whole lines

    def append(self, line: str) -> None:
        """Write a line, and those before it that are still to be written."""
        self._pending.append(line)
        text = "".join(f"{line}\n" for line in self._pending).encode()
        try:
            while text:  # a disk that fills up takes a part
                text = text[self._file.write(text) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._length)
            if len(self._pending) == 1:
                logger.warning(
                    "%s cannot be written (%s); its lines wait for room", self._path, error.strerror
                )
            return
        self._length = os.fstat(self._file.fileno()).st_size
        self._pending.clear()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
