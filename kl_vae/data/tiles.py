"""Go through an image piece by piece, so that converting it takes little memory."""

from collections.abc import Iterator

# of a tile: as floats it fits into a processor's cache, and its memory is used again for the next,
# where the system would give new pages, and clear them, for what is as large as an image
PIXELS = 2**15


def tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of each tile of an image: whole rows, unless one is too long."""
    columns = min(width, PIXELS)
    rows = PIXELS // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, min(top + rows, height)), slice(left, min(left + columns, width))
