"""What the numbers in image files mean: which values are black and white, and what pages are.

A file states its depth, or not: 12-bit values are often stored in 16-bit files, and floats have no
depth at all. What files do not state is decided once for a data set, by `decide_format`, from a
sample of its files, or by the user (`data.range`, `data.pages`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from kl_vae.runtime.schema import show

logger = logging.getLogger(__name__)

Range = tuple[float, float]  # the values of black and of white
Pages = Literal["first", "channels", "images"]

# `data.range`: auto, [low, high], or a range per kind of numbers
ValueRange = str | Sequence[float] | Mapping[str, Sequence[float]]

AUTO = "auto"
HOW_TO_SET_PAGES = "set data.pages to first, channels or images (--pages of a command)"
# key of a range for numbers of every kind; values outside are clamped
ALL = "all"
KINDS = (ALL, "float", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
# depths in bits of integers that are stored with 16 bits
DEPTHS = (8, 10, 12, 14)
# ranges of numbers for which nothing else is known
FULL: dict[str, Range] = {"uint8": (0, 255), "uint16": (0, 65535)}
DEFAULTS: dict[str, Range] = {**FULL, "float": (0, 1)}
# maximum number of files that `decide_format` reads, evenly spaced over the data set, and how many
# of them it decodes
SAMPLED, DECODED = 512, 64
# floats outside their range by up to this fraction of it are clamped: rounding
TOLERANCE = 1e-5


class PixelFormat(NamedTuple):
    """How the files of a data set are read.

    Attributes:
        ranges: values of black and white by kind of numbers (`uint8`, `uint16`, ..., `float`), or
            for `ALL`; for other kinds, the depth that a file states.
        pages: what the pages of a TIFF file are; None: a file with several pages is an error,
            unless their number is that of the channels.
        page: the page to read; None: the first one, or all as channels.
    """

    ranges: Mapping[str, Range] = {}
    pages: Pages | None = None
    page: int | None = None

    @property
    def value_range(self) -> ValueRange:
        """The ranges as a value of `data.range`."""
        if ALL in self.ranges:
            return list(self.ranges[ALL])
        return {kind: list(pair) for kind, pair in self.ranges.items()} or AUTO


class Measured(NamedTuple):
    """Numbers of an image whose file does not state their depth: kind, extremes, its name."""

    kind: str
    low: float
    high: float
    name: str = ""


class Inspected(NamedTuple):
    """What a file states about its numbers.

    Attributes:
        measured: numbers whose depth the file does not state; None: it does.
        pages: number of pages of a TIFF file; 1 for other files.
        bands: number of samples per pixel of a TIFF file.
        animated: whether it has other frames.
    """

    measured: Measured | None = None
    pages: int = 1
    bands: int = 1
    animated: bool = False

    def are_channels(self, channels: int) -> bool:
        """Return whether its pages can only be the channels of one image."""
        return self.bands * self.pages == channels and channels not in (1, 3, 4)


class Inspectable(Protocol):
    """A sequence of images whose files can be inspected."""

    @property
    def channels(self) -> int:
        """Number of channels of all images."""

    def __len__(self) -> int:
        """Return the number of images."""

    def inspect(self, index: int) -> Inspected:
        """Return what the file of an image states about its numbers."""

    def name(self, index: int) -> str:
        """Return the name of an image in messages."""


def decide_format(source: Inspectable, value_range: ValueRange, pages: str | None) -> PixelFormat:
    """Decide how the files of a data set are read, from a sample of them, and log it.

    Args:
        source: the images.
        value_range: `data.range`: auto, [low, high], or a range per kind of numbers; other kinds
            are decided as by auto.
        pages: `data.pages`.

    Raises:
        ValueError: an argument is invalid; numbers do not fit any usual range; files have several
            pages and `pages` is None.
    """
    given, pages = parse_ranges(value_range), check_pages(pages)
    measured: list[Measured] = []
    animated = 0
    count = min(len(source), SAMPLED)
    stride = SAMPLED // DECODED  # the first `DECODED` are spread over the whole data set, too
    for i in (i for start in range(stride) for i in range(start, count, stride)):
        index = i * len(source) // count
        try:
            found = source.inspect(index)
        except ValueError:  # reported when the image is read
            continue
        if found.pages > 1 and pages is None and not found.are_channels(source.channels):
            raise ValueError(f"{source.name(index)}: {found.pages} pages; {HOW_TO_SET_PAGES}")
        animated += found.animated
        if found.measured is not None:
            measured.append(found.measured._replace(name=source.name(index)))
            if ALL in given or len(measured) >= DECODED:
                break
    ranges = dict(given)
    if ALL not in given:
        new = [values for values in measured if values.kind not in given]
        ranges |= decide_ranges(new)
        for kind, number in Counter(values.kind for values in new).items():
            logger.info(
                "%s images: black is %g, white is %g (from %d sampled files; see data.range)",
                kind,
                *ranges[kind],
                number,
            )
    if animated:
        logger.warning(
            "%d of %d sampled files are animations: only their first frame is read", animated, count
        )
    return PixelFormat(ranges, pages)


def parse_ranges(value: ValueRange | None) -> dict[str, Range]:
    """Return the ranges of a `data.range`: `auto`, [low, high], or a mapping by kind of numbers.

    Raises:
        ValueError: the value is none of these.
    """
    if value is None or value == AUTO:
        return {}
    pairs: Mapping[str, Any] = value if isinstance(value, Mapping) else {ALL: value}
    for kind, pair in pairs.items():
        numbers = isinstance(pair, (list, tuple)) and all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and np.isfinite(x) for x in pair
        )
        if kind not in KINDS or not numbers or len(pair) != 2 or not pair[0] < pair[1]:
            raise ValueError(
                f"range={show(value)}: give auto, or the values of black and white, such as "
                "[0, 4095]"
            )
    return {kind: (pair[0], pair[1]) for kind, pair in pairs.items()}


def check_pages(pages: str | None) -> Pages | None:
    """Return `pages`, checked.

    Raises:
        ValueError: it is not one of the `Pages`.
    """
    if pages is not None and pages not in get_args(Pages):
        raise ValueError(f"pages={show(pages)}: choose one of {', '.join(get_args(Pages))}")
    return pages  # type: ignore[return-value]


def kind_of(dtype: np.dtype[Any]) -> str:
    """Return the kind of numbers of a dtype: `float`, or the name of an integer dtype.

    Raises:
        ValueError: they are neither.
    """
    if dtype.kind not in "uif":
        raise ValueError(f"{dtype} values: save integers or real numbers")
    return "float" if dtype.kind == "f" else dtype.newbyteorder("=").name


def extremes(values: NDArray[Any]) -> Range:
    """Return the lowest and the highest value.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # min and max propagate NaN
        kind = kind_of(values.dtype)
        raise ValueError(f"{kind} values from {low:g} to {high:g}: save finite values")
    return low, high


def black_and_white(values: NDArray[Any], bits: int | None, ranges: Mapping[str, Range]) -> Range:
    """Return the values of black and white in an image.

    Args:
        values: of the image.
        bits: depth that the file states; None: it states none.
        ranges: of the data set.

    Raises:
        ValueError: a value lies outside, by more than rounding.
    """
    kind = kind_of(values.dtype)
    # a range of 12 bits is not meant for files of 8 bits beside them
    if ALL in ranges and not (kind == "uint8" and ranges[ALL][1] > 255):
        extremes(values)
        return ranges[ALL]
    if bits is not None:
        return 0, 2**bits - 1
    black, white = ranges.get(kind, DEFAULTS.get(kind, (np.nan, np.nan)))
    if (black, white) == FULL.get(kind):
        return black, white
    low, high = extremes(values)
    if np.isnan(black):
        raise ValueError(f"{kind} values from {low:.7g} to {high:.7g}: {how_to_set(low, high)}")
    slack = 0.0
    if kind == "float":
        slack = max(TOLERANCE, 2 * float(np.finfo(values.dtype).eps)) * (white - black)
    if low < black - slack or high > white + slack:
        raise ValueError(
            f"{kind} values from {low:.7g} to {high:.7g} are not within [{black:g}, {white:g}]: "
            f"{how_to_set(low, high)}"
        )
    return black, white


def how_to_set(low: float, high: float) -> str:
    """Return the fix for values without a known range."""
    if low == high:
        return "set data.range=[BLACK, WHITE] (--range BLACK WHITE)"
    return (
        f"set data.range=[{low:.7g}, {high:.7g}] (--range {low:.7g} {high:.7g}), or the "
        "values that are black and white"
    )


def decide_ranges(measured: Iterable[Measured]) -> dict[str, Range]:
    """Return the ranges of a data set from a sample of its images.

    Integers are read with the smallest depth of `DEPTHS` that holds all sampled values, else with
    16 bits. Floats are in [0, 1] or [-1, 1].

    Raises:
        ValueError: values do not fit; the message shows them.
    """
    by_kind: dict[str, list[Measured]] = {}
    for values in measured:
        by_kind.setdefault(values.kind, []).append(values)
    ranges: dict[str, Range] = {}
    for kind, images in by_kind.items():
        lowest, highest = min(images, key=lambda x: x.low), max(images, key=lambda x: x.high)
        low, high = lowest.low, highest.high
        if kind == "float":
            fitting = [(black, 1.0) for black in (0.0, -1.0)]
        else:
            depths = [bits for bits in DEPTHS if high > 0] + [16]
            fitting = [(0, 2**bits - 1) for bits in depths]
        slack = TOLERANCE * (kind == "float")
        found = [pair for pair in fitting if pair[0] - slack <= low and high <= pair[1] + slack]
        if not found:
            raise ValueError(
                f"{kind} values from {low:.7g} ({lowest.name}) to {high:.7g} ({highest.name}): "
                f"{how_to_set(low, high)}"
            )
        ranges[kind] = found[0]
    return ranges


# --- conversion of stored values


def as_uint8(values: NDArray[Any], black_white: Range, inverted: bool = False) -> NDArray[np.uint8]:
    """Scale values to 0..255 by rounding, and clamp them; `inverted`: the lowest is white."""
    if values.dtype in (np.uint8, np.uint16):
        return np.take(_table(values.dtype.name, black_white, inverted), values)
    black, white = black_white[::-1] if inverted else black_white
    scaled = (values.astype(np.float64) - black) * (255 / (white - black))
    result: NDArray[np.uint8] = np.rint(scaled).clip(0, 255).astype(np.uint8)
    return result


@lru_cache(maxsize=16)
def _table(dtype: str, black_white: Range, inverted: bool) -> NDArray[np.uint8]:
    """Return `as_uint8` of each value of an unsigned dtype."""
    return as_uint8(np.arange(np.iinfo(dtype).max + 1, dtype=np.int64), black_white, inverted)


def as_unit_float(values: NDArray[Any], black_white: Range) -> NDArray[np.float32]:
    """Scale values to float32 in [0, 1], and clamp them."""
    black, white = black_white
    if (black, white) != (0, 1):
        wide = np.float32 if values.dtype.itemsize <= 2 else np.float64
        values = (values.astype(wide) - wide(black)) / wide(white - black)
    result: NDArray[np.float32] = values.astype(np.float32).clip(0, 1)
    return result
