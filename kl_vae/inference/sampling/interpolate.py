"""Between the latents of two images.

Latents are [z, h, w], and a vector here is all z * h * w values of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

_SMALLEST_SINE = 1e-4  # of the angle between two vectors, below which their plane is not known


class PathPoint(NamedTuple):
    """A point on the path from one image over others to the last."""

    pair: int  # between the images `pair` and `pair` + 1
    step: int
    fraction: float  # of the way, 0 at the first of both, 1 at the second


def path_point(index: int, steps: int) -> PathPoint:
    """The point `index` of a path that has `steps` points a pair of images, both ends included."""
    pair, step = divmod(index, steps)
    return PathPoint(pair, step, step / (steps - 1))


def interpolate(images: Sequence[Tensor], index: int, steps: int, linear: bool = False) -> Tensor:
    """The latents at `path_point(index, steps)` between those of the images."""
    pair, _, fraction = path_point(index, steps)
    between = lerp if linear else slerp
    return between(images[pair], images[pair + 1], fraction)


def lerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """(1 - fraction) start + fraction end."""
    return (1.0 - fraction) * start + fraction * end


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """The great arc between the directions of two vectors (Shoemake 1985, "Animating rotation").

    sin((1 - t) w) / sin(w) u + sin(t w) / sin(w) v for the unit vectors u and v at an angle w. The
    lengths of both are interpolated linearly. Far apart vectors have a middle as long as they are,
    where that of `lerp` is shorter, and so nearer to grey. `lerp` it is where there is no arc, or
    not one alone: of vectors that are zero, or nearly parallel or opposite.
    """
    # float64: the difference of nearly equal directions
    first, second = start.double(), end.double()
    lengths = first.norm(), second.norm()
    if min(lengths) == 0:
        return lerp(start, end, fraction)
    u, v = first / lengths[0], second / lengths[1]
    angle = (u * v).sum().clamp(-1.0, 1.0).acos()
    if angle.sin() < _SMALLEST_SINE:
        return lerp(start, end, fraction)
    direction = ((1.0 - fraction) * angle).sin() * u + (fraction * angle).sin() * v
    length = (1.0 - fraction) * lengths[0] + fraction * lengths[1]
    point: Tensor = length * direction / angle.sin()
    return point.to(start.dtype)
