"""Encode and decode in tiles that overlap and are blended: least memory, but not the same result.

Each tile is normalised and attends within itself, so that its colours and contrast differ a little
from those of the whole image. B batch, C channels, H and W the image's height and width, h = H/f,
w = W/f, z latent channels. A span is a pair of offsets [start, stop) along one axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kl_vae.model import AutoEncoderKL

Span = tuple[int, int]


def encode_blended(model: AutoEncoderKL, images: Tensor, tile: int, overlap: int) -> Tensor:
    """Images [B, C, H, W] -> moments [B, 2z, h, w], from tiles of `tile` pixels.

    Raises:
        ValueError: tile or overlap is not a multiple of f.
    """
    f = model.downsampling_factor
    check_tiles(tile, overlap, f)
    return _blended(
        lambda part: model.encode(part).parameters, images, 1, f, (tile // f, overlap // f)
    )


def decode_blended(model: AutoEncoderKL, z: Tensor, tile: int, overlap: int) -> Tensor:
    """Latents [B, z, h, w] -> images [B, C, H, W], from tiles of `tile` pixels.

    Raises:
        ValueError: as `encode_blended`.
    """
    f = model.downsampling_factor
    check_tiles(tile, overlap, f)
    return _blended(model.decode, z, f, 1, (tile // f, overlap // f))


def check_tiles(tile: int, overlap: int, f: int) -> None:
    """Raise ValueError unless tiles and their overlaps are whole latents."""
    for key, value in (("tile", tile), ("overlap", overlap)):
        if value % f:
            raise ValueError(
                f"{key}={value}: must be a multiple of the model's downsampling factor {f}; "
                f"give {value // f * f + f}"
            )


def spans_of(length: int, tile: int, overlap: int) -> list[Span]:
    """Spans of one tile's length that cover an axis evenly and overlap by `overlap` or more."""
    if length <= tile:
        return [(0, length)]
    number = math.ceil((length - overlap) / (tile - overlap))
    starts = [round(i * (length - tile) / (number - 1)) for i in range(number)]
    return [(start, start + tile) for start in starts]


def ramps_of(spans: list[Span], scale: int) -> list[Tensor]:
    """The weight of each position of each span, in float32; of a position they add up to 1.

    Within an overlap they rise or fall linearly. `scale` is the number of positions of a unit.
    """
    weights = []
    for i, (start, stop) in enumerate(spans):
        weight = torch.ones((stop - start) * scale)
        if i > 0:
            ramp = _ramp((spans[i - 1][1] - start) * scale)
            weight[: len(ramp)] *= ramp
        if i < len(spans) - 1:
            ramp = _ramp((stop - spans[i + 1][0]) * scale)
            weight[len(weight) - len(ramp) :] *= ramp.flip(0)
        weights.append(weight)
    total = torch.zeros(spans[-1][1] * scale)
    for (start, stop), weight in zip(spans, weights, strict=True):
        total[start * scale : stop * scale] += weight
    return [
        weight / total[start * scale : stop * scale]
        for (start, stop), weight in zip(spans, weights, strict=True)
    ]


def _ramp(length: int) -> Tensor:
    return (torch.arange(length) + 0.5) / max(1, length)


def _blended(
    function: Callable[[Tensor], Tensor], x: Tensor, up: int, down: int, tiles: tuple[int, int]
) -> Tensor:
    """Apply `function` to tiles of x and blend what it gives.

    A latent is `down` positions of x, and `up` of the result; `tiles` are the side of a tile and
    the least overlap in latents.
    """
    rows, columns = (spans_of(side // down, *tiles) for side in x.shape[2:])
    if len(rows) == len(columns) == 1:
        return function(x)
    out: Tensor | None = None
    dtype = x.dtype
    for (top, bottom), of_rows in zip(rows, ramps_of(rows, up), strict=True):
        for (left, right), of_columns in zip(columns, ramps_of(columns, up), strict=True):
            part = x[:, :, top * down : bottom * down, left * down : right * down]
            done = function(part)
            dtype = done.dtype
            if out is None:  # float32 at least, since it is a sum
                shape = (*done.shape[:2], rows[-1][1] * up, columns[-1][1] * up)
                kind = torch.promote_types(dtype, torch.float32)
                out = torch.zeros(shape, dtype=kind, device=done.device)
            weights = of_rows[:, None] * of_columns
            where = out[:, :, top * up : bottom * up, left * up : right * up]
            where += done * weights.to(done.device)
    assert out is not None
    return out.to(dtype)
