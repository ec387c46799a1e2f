"""What of an image is wanted, so that no more of it need be decoded and converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Wanted(NamedTuple):
    """What a source may leave out of an image, and what it must cut out.

    Attributes:
        short_side: a JPEG may be decoded smaller, its short side no less than this; see `draft`.
            None: as large as it is stored.
        region: called once with (height, width) of the image, it gives the rows and columns that
            are wanted; its ValueError is the image's. None: all.
    """

    short_side: int | None = None
    region: Callable[[int, int], tuple[slice, slice]] | None = None

    def places(self, height: int, width: int) -> tuple[slice, slice]:
        """Return the rows and columns, each with a start and a stop."""
        if self.region is None:
            return slice(0, height), slice(0, width)
        return self.region(height, width)

    def cut(self, image: Tensor) -> Tensor:
        """Cut the region out of [C,H,W]."""
        rows, columns = self.places(*image.shape[1:])
        return image[:, rows, columns]


EVERYTHING = Wanted()
