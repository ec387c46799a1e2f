"""Read metrics.jsonl while it grows, in memory that does not grow with it."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from kl_vae.visual.report.series import MAX_VECTOR_POINTS, Series, VectorSeries

MAX_LINE_BYTES = 1 << 20
MAX_FIGURES = 400
MAX_CHANNELS = 4096
MAX_VECTOR_NUMBERS = 1 << 14  # of one figure: points x channels
RECENT_SPEEDS = 20  # lines
MAX_STEP = 1 << 53  # a page's numbers are exact to here


class MetricsFile:
    """All that the lines of metrics.jsonl say, thinned.

    Attributes:
        scalars: by name, such as "train/psnr".
        vectors: those with a value a latent channel, such as "val/latent_mean".
        lines: that could be read.
        unreadable: lines that are no such figures; the last, while it is being written, is none.
        left_out: figures, of which there are more than a page can show.
        latest: step of the last line; None: there is no line.
        speeds: images a second, of the last lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._begin()

    def _begin(self) -> None:
        self._offset = 0  # of the first line that has not been read
        self.scalars: dict[str, Series] = {}
        self.vectors: dict[str, VectorSeries] = {}
        self.lines = self.unreadable = self.left_out = 0
        self._left_out: set[str] = set()
        self.latest: int | None = None
        self.speeds: deque[float] = deque(maxlen=RECENT_SPEEDS)

    @property
    def recent_speed(self) -> float | None:
        """Median of the last lines' images a second; None where nothing says it."""
        speeds = sorted(self.speeds)
        return speeds[len(speeds) // 2] if speeds else None

    def read(self, progress: Callable[[int], object] = lambda size: None) -> None:
        """Take in the lines that were not there at the last call.

        All of them, where the file is another one since (a run that is resumed drops lines).

        Args:
            progress: called with the number of bytes that were read, now and then.

        Raises:
            ValueError: the file is there and cannot be read.
        """
        try:
            file = open(self._path, "rb")  # noqa: SIM115  # closed by `with` below
        except FileNotFoundError:
            self._begin()
            return
        except OSError as error:
            raise ValueError(
                f"{self._path}: cannot be read ({error.strerror}); give yourself permission to, or "
                "copy the run"
            ) from error
        with file:
            self._read(file, progress)

    def _read(self, file: BinaryIO, progress: Callable[[int], object]) -> None:
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._inode = status.st_ino
            self._begin()
        file.seek(self._offset)
        reported = self._offset
        while line := file.readline(MAX_LINE_BYTES):
            if not line.endswith(b"\n"):
                if len(line) < MAX_LINE_BYTES:
                    break  # its rest is still to be written
                if not self._skip_rest(file):
                    break
                self.unreadable += 1
            elif not self._take(line):
                self.unreadable += 1
            self._offset = file.tell()
            if self._offset - reported > 1 << 20:
                progress(self._offset - reported)
                reported = self._offset
        progress(self._offset - reported)

    def _skip_rest(self, file: BinaryIO) -> bool:
        """Go to the end of a line; False: it has none yet."""
        while part := file.readline(MAX_LINE_BYTES):
            if part.endswith(b"\n"):
                return True
        return False

    def _take(self, line: bytes) -> bool:
        """Take in a line; whether it could be read."""
        try:
            content = json.loads(line)
            step = content.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        if type(step) is not int or not 0 <= step < MAX_STEP:
            return False
        self.lines += 1
        self.latest = step
        for key, value in content.items():
            self._add(key, step, value)
        return True

    def _add(self, key: str, step: int, value: Any) -> None:
        if isinstance(value, list):
            vector = self.vectors.get(key)
            if vector is None:
                if not 0 < len(value) <= MAX_CHANNELS or not self._has_room(key):
                    return
                points = min(MAX_VECTOR_POINTS, MAX_VECTOR_NUMBERS // len(value))
                vector = self.vectors[key] = VectorSeries(len(value), points)
            numbers = [x for x in map(_number, value) if x is not None]
            if len(numbers) == len(value):
                vector.add(step, numbers)
            return
        number = _number(value)
        if number is None:
            return
        series = self.scalars.get(key)
        if series is None:
            if not self._has_room(key):
                return
            series = self.scalars[key] = Series()
        series.add(step, number)
        if key == "images_per_second" and 0 < number < math.inf:
            self.speeds.append(number)

    def _has_room(self, key: str) -> bool:
        if len(self.scalars) + len(self.vectors) < MAX_FIGURES and len(key) <= 200:
            return True
        if key not in self._left_out and len(self._left_out) < MAX_FIGURES:
            self._left_out.add(key)
            self.left_out += 1
        return False


def _number(value: Any) -> float | None:
    """What a line has for a figure; text says of one that is not finite which it was."""
    if type(value) is float:
        return value
    try:
        return float(value) if type(value) in (int, str) else None
    except (ValueError, OverflowError):
        return None
