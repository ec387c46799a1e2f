"""The course of a figure over millions of steps, in few points that hide neither spike nor NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_POINTS = 1000  # of a scalar: three numbers each
MAX_VECTOR_POINTS = 256  # of a vector: a number a channel each


@dataclass
class Bucket:
    """What the lines of neighbouring steps say of one figure.

    `count` counts all of them, `broken` those whose value is not finite, which are in none of
    `total` (the sum), `low` and `high`. `kinds` are the broken values as they were written.
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
        """Of the finite values; None where there is none."""
        finite = self.count - self.broken
        return self.total / finite if finite else None

    def add(self, step: int, value: float) -> None:
        """Take in a value."""
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
        """Take in the bucket after this one."""
        self.last = other.last
        self.count += other.count
        self.broken += other.broken
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.kinds |= other.kinds


class Series:
    """One scalar figure, in at most `max_points` buckets of equally many steps.

    Few lines stay as they are; each time that there are too many, neighbours are merged and a
    bucket spans twice as many steps.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.buckets: list[Bucket] = []
        self.latest: tuple[int, float] = (0, math.nan)  # step and value of the last line
        self._max_points = max_points
        self._width = 1  # steps

    def add(self, step: int, value: float) -> None:
        """Take in a line; where the run was set back, what is done again replaces the old."""
        self.latest = (step, value)
        buckets = self.buckets
        while buckets and buckets[-1].last > step:
            buckets.pop()
        if not buckets or buckets[-1].first // self._width != step // self._width:
            if len(buckets) == self._max_points:
                self.halve()
                self.add(step, value)
                return
            buckets.append(Bucket(step, step))
        buckets[-1].add(step, value)

    def halve(self) -> None:
        """Double the steps of a bucket, until there are fewer of them (if there are two)."""
        before = len(self.buckets)
        while len(self.buckets) == before > 1:
            self._width *= 2
            merged: list[Bucket] = []
            for bucket in self.buckets:
                if merged and merged[-1].first // self._width == bucket.first // self._width:
                    merged[-1].merge(bucket)
                else:
                    merged.append(bucket)
            self.buckets = merged

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


class VectorSeries:
    """One figure with a value a channel: the means of buckets, as `Series`.

    Lines whose values are not all finite, or of another number of channels, are left out.
    """

    def __init__(self, channels: int, max_points: int = MAX_VECTOR_POINTS) -> None:
        self.channels = channels
        self.steps: list[tuple[int, int]] = []  # first and last
        self._sums: list[list[float]] = []
        self._counts: list[int] = []
        self._max_points = max_points
        self._width = 1  # steps

    @property
    def means(self) -> list[list[float]]:
        """[points][channels]."""
        pairs = zip(self._sums, self._counts, strict=True)
        return [[total / count for total in sums] for sums, count in pairs]

    def add(self, step: int, values: Sequence[float]) -> None:
        """Take in a line."""
        if len(values) != self.channels or not all(map(math.isfinite, values)):
            return
        while self.steps and self.steps[-1][1] > step:
            del self.steps[-1], self._sums[-1], self._counts[-1]
        if not self.steps or self.steps[-1][0] // self._width != step // self._width:
            if len(self.steps) == self._max_points:
                self._halve()
                self.add(step, values)
                return
            self.steps.append((step, step))
            self._sums.append(list(values))
            self._counts.append(1)
            return
        self.steps[-1] = (self.steps[-1][0], step)
        self._sums[-1] = [a + b for a, b in zip(self._sums[-1], values, strict=True)]
        self._counts[-1] += 1

    def _halve(self) -> None:
        before = len(self.steps)
        while len(self.steps) == before > 1:
            self._width *= 2
            steps, sums, counts = self.steps, self._sums, self._counts
            self.steps, self._sums, self._counts = [], [], []
            for (first, last), total, count in zip(steps, sums, counts, strict=True):
                if self.steps and self.steps[-1][0] // self._width == first // self._width:
                    self.steps[-1] = (self.steps[-1][0], last)
                    self._sums[-1] = [a + b for a, b in zip(self._sums[-1], total, strict=True)]
                    self._counts[-1] += count
                else:
                    self.steps.append((first, last))
                    self._sums.append(total)
                    self._counts.append(count)
