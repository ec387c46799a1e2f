"""Feature maps as overlapping tiles of 6 x 6, some rows of tiles at a time.

B batch, C channels, H and W height and width, n tiles of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_vae.fast.scratch import scratch


@dataclass(frozen=True)
class Piece:
    """Some rows of tiles of some images.

    Attributes:
        image: the first image.
        images: how many.
        line: the first row of tiles.
        lines: how many.
        across: tiles of a row.
    """

    image: int
    images: int
    line: int
    lines: int
    across: int

    @property
    def tiles(self) -> int:
        """N."""
        return self.images * self.lines * self.across

    def of(self, pixels: Tensor, height: int) -> Tensor:
        """Its part of a map [B, H, W, C] of which each tile has so many rows."""
        rows = slice(height * self.line, height * (self.line + self.lines))
        return pixels[self.image : self.image + self.images, rows]


def pieces(batch: int, down: int, across: int, most: int) -> Iterator[Piece]:
    """All of a batch with `down` x `across` tiles, about `most` tiles at a time, evenly."""
    images, lines = _even(batch, most // (down * across)), _even(down, most // across)
    for image in range(0, batch, images):
        for line in range(0, down, lines):
            yield Piece(image, min(images, batch - image), line, min(lines, down - line), across)


def read_tiles(
    pixels: Tensor,
    piece: Piece,
    padding: tuple[int, int],
    activation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The tiles of a piece, [36, n * C], valid until the next ones are read.

    Args:
        pixels: [B, H, W, C].
        piece: which ones.
        padding: rows of zeros above and below, columns of them at the left and right; beyond them
            zeros too make up the last tiles.
        activation: scale and shift, [B, 1, 1, C] each: of silu(scale * pixels + shift).
    """
    _, height, width, channels = pixels.shape
    images, lines, across = piece.images, piece.lines, piece.across
    padded = scratch("padded", images, 4 * lines + 2, 4 * across + 2, channels)
    top = 4 * piece.line - padding[0]  # the first row of the input that is needed
    first, last = max(top, 0), min(top + 4 * lines + 2, height)
    left, right = padding[1], padding[1] + width
    for border in (
        padded[:, : first - top],
        padded[:, last - top :],
        padded[:, :, :left],
        padded[:, :, right:],
    ):
        border.zero_()
    inside = padded[:, first - top : last - top, left:right]
    chosen = slice(piece.image, piece.image + images)
    if activation is None:
        inside.copy_(pixels[chosen, first:last])
    else:
        scale, shift = (y[chosen] for y in activation)
        F.silu(torch.mul(pixels[chosen, first:last], scale, out=inside).add_(shift), inplace=True)
    tiles = scratch("tiles", 6, 6, images, lines, across, channels)
    tiles.copy_(padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3))
    return tiles.view(36, -1)


def _even(total: int, most: int) -> int:
    """The size of parts of `total` that are about equal and have at most `most`, or 1."""
    return ceil(total / ceil(total / max(1, most)))
