"""Go through an image piece by piece, so that converting it takes little memory."""

from collections.abc import Iterator

SIDE = 512  # of a tile, in pixels: as floats it fits into a processor's cache


def tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of each tile of an image; along both, since one may be long."""
    for top in range(0, height, SIDE):
        for left in range(0, width, SIDE):
            yield slice(top, min(top + SIDE, height)), slice(left, min(left + SIDE, width))
