"""Read metrics.jsonl while it grows, into thinned series in bounded memory.

A series keeps few points of millions of steps, and hides neither extremes nor NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from kl_vae.checkpoints.run_files import metric_number

MAX_POINTS = 1000  # of a scalar: three numbers each
MAX_VECTOR_POINTS = 256  # of a vector: one number per channel each
MAX_LINE_BYTES = 1 << 20
MAX_METRICS = 400
MAX_CHANNELS = 4096
MAX_VECTOR_NUMBERS = 1 << 14  # of one metric: points x channels
RECENT_SPEEDS = 20  # lines
MAX_STEP = 1 << 53  # a page's numbers are exact to here


class _Mergeable(Protocol):
    first: int
    last: int

    def merge(self: B, other: B) -> None: ...


B = TypeVar("B", bound=_Mergeable)


def _merge_neighbours(buckets: list[B], width: int) -> tuple[list[B], int]:
    """Double the steps per bucket until there are fewer buckets; return them and the new width."""
    before = len(buckets)
    while len(buckets) == before > 1:
        width *= 2
        merged: list[B] = []
        for bucket in buckets:
            if merged and merged[-1].first // width == bucket.first // width:
                merged[-1].merge(bucket)
            else:
                merged.append(bucket)
        buckets = merged
    return buckets, width


@dataclass
class Bucket:
    """The values of one metric over neighbouring steps.

    `count` counts all of them, `broken` those that are not finite. `total` (the sum), `low`
    and `high` are of the finite ones; `kinds` holds the texts of the others.
    """

    first: int
    last: int
    count: int = 0
    broken: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    kinds: set[str] = field(default_factory=set)

    @property
    def mean(self) -> float | None:
        """Mean of the finite values; None where there is none."""
        finite = self.count - self.broken
        return self.total / finite if finite else None

    def add(self, step: int, value: float) -> None:
        """Add a value."""
        self.last = step
        self.count += 1
        if not math.isfinite(value):
            self.broken += 1
            self.kinds.add(str(value))
            return
        self.total += value
        if value < self.low:
            self.low = value
        if value > self.high:
            self.high = value

    def merge(self, other: Bucket) -> None:
        """Add the values of the next bucket."""
        self.last = other.last
        self.count += other.count
        self.broken += other.broken
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.kinds |= other.kinds


class Series:
    """One scalar metric, in at most `max_points` buckets of equally many steps.

    A short series keeps each line; when there are too many, neighbours are merged and a bucket
    spans twice as many steps.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.buckets: list[Bucket] = []
        self.latest: tuple[int, float] = (0, math.nan)  # step and value of the last line
        self._max_points = max_points
        self._width = 1  # steps

    def add(self, step: int, value: float) -> None:
        """Add a line; lines of later steps, which a resumed run computes again, are dropped."""
        self.latest = (step, value)
        while self.buckets and self.buckets[-1].last > step:
            self.buckets.pop()
        if not self.buckets or self.buckets[-1].first // self._width != step // self._width:
            if len(self.buckets) == self._max_points:
                self.halve()
                self.add(step, value)
                return
            self.buckets.append(Bucket(step, step))
        self.buckets[-1].add(step, value)

    def halve(self) -> None:
        """Merge neighbouring buckets until there are fewer of them (if there are two)."""
        self.buckets, self._width = _merge_neighbours(self.buckets, self._width)

    @property
    def thinned(self) -> bool:
        """Whether a bucket holds several lines."""
        return any(bucket.count > 1 for bucket in self.buckets)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest finite value; (inf, -inf) where there is none."""
        return (
            min((bucket.low for bucket in self.buckets), default=math.inf),
            max((bucket.high for bucket in self.buckets), default=-math.inf),
        )


@dataclass
class _VectorBucket:
    """Sums per channel over neighbouring steps."""

    first: int
    last: int
    sums: list[float]
    count: int = 1

    def merge(self, other: _VectorBucket) -> None:
        """Add the values of the next bucket."""
        self.last = other.last
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        self.count += other.count


class VectorSeries:
    """One metric with a value per channel: the means of buckets, as `Series`.

    Lines with values that are not finite, or with another number of channels, are left out.
    """

    def __init__(self, channels: int, max_points: int = MAX_VECTOR_POINTS) -> None:
        self.channels = channels
        self._buckets: list[_VectorBucket] = []
        self._max_points = max_points
        self._width = 1  # steps

    @property
    def steps(self) -> list[tuple[int, int]]:
        """First and last step per point."""
        return [(bucket.first, bucket.last) for bucket in self._buckets]

    @property
    def means(self) -> list[list[float]]:
        """[points][channels]."""
        return [[total / bucket.count for total in bucket.sums] for bucket in self._buckets]

    def add(self, step: int, values: Sequence[float]) -> None:
        """Add a line; lines of later steps are dropped."""
        if len(values) != self.channels or not all(map(math.isfinite, values)):
            return
        while self._buckets and self._buckets[-1].last > step:
            self._buckets.pop()
        line = _VectorBucket(step, step, list(values))
        if self._buckets and self._buckets[-1].first // self._width == step // self._width:
            self._buckets[-1].merge(line)
            return
        if len(self._buckets) == self._max_points:
            self._buckets, self._width = _merge_neighbours(self._buckets, self._width)
            self.add(step, values)
            return
        self._buckets.append(line)


class MetricsFile:
    """The metrics of metrics.jsonl, thinned.

    Attributes:
        scalars: by name, such as "train/psnr".
        vectors: those with a value per latent channel, such as "val/latent_mean".
        lines: number of lines that could be read.
        unreadable: number of other lines, without a last one that is still being written.
        left_out: number of metrics beyond what a page can show.
        latest: step of the last line; None if there is none.
        speeds: images per second, of the last lines.
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
        """Median images per second of the last lines; None if there are none."""
        speeds = sorted(self.speeds)
        return speeds[len(speeds) // 2] if speeds else None

    def read(self, progress: Callable[[int], object] = lambda size: None) -> None:
        """Read the lines written since the last call; all of them where the file was replaced.

        A resumed run replaces the file, to drop lines.

        Args:
            progress: called with numbers of bytes read.

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
        """Skip to the end of a line; return False if it is not written yet."""
        while part := file.readline(MAX_LINE_BYTES):
            if part.endswith(b"\n"):
                return True
        return False

    def _take(self, line: bytes) -> bool:
        """Add a line; return whether it could be read."""
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
            numbers = [x for x in map(metric_number, value) if x is not None]
            if len(numbers) == len(value):
                vector.add(step, numbers)
            return
        number = metric_number(value)
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
        if len(self.scalars) + len(self.vectors) < MAX_METRICS and len(key) <= 200:
            return True
        if key not in self._left_out and len(self._left_out) < MAX_METRICS:
            self._left_out.add(key)
            self.left_out += 1
        return False
