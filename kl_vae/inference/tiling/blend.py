"""Encoding and decoding in overlapping, blended tiles: least memory, but an approximate result.

Group norms and attention see a single tile only, so that the colours and contrast of a tile differ
slightly from those of the whole image.

Shapes: B batch, C channels, H and W image height and width, h = H/f, w = W/f, z latent channels. A
span is a pair of offsets [start, stop) along one axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kl_vae.model import AutoEncoderKL

Span = tuple[int, int]


def encode_blended(model: AutoEncoderKL, images: Tensor, tile: int, overlap: int) -> Tensor:
    """Encode images [B, C, H, W] to moments [B, 2z, h, w] in tiles of `tile` pixels per side.

    Raises:
        ValueError: `tile` or `overlap` is not a multiple of f.
    """
    f = model.downsampling_factor
    check_tiles(tile, overlap, f)
    return _blended(
        lambda part: model.encode(part).parameters, images, 1, f, (tile // f, overlap // f)
    )


def decode_blended(model: AutoEncoderKL, z: Tensor, tile: int, overlap: int) -> Tensor:
    """Decode latents [B, z, h, w] to images [B, C, H, W] in tiles of `tile` pixels per side.

    Raises:
        ValueError: see `encode_blended`.
    """
    f = model.downsampling_factor
    check_tiles(tile, overlap, f)
    return _blended(model.decode, z, f, 1, (tile // f, overlap // f))


def check_tiles(tile: int, overlap: int, f: int) -> None:
    """Raise ValueError unless `tile` and `overlap` are multiples of f."""
    for key, value in (("tile", tile), ("overlap", overlap)):
        if value % f:
            raise ValueError(
                f"{key}={value}: must be a multiple of the model's downsampling factor {f}; "
                f"give {value // f * f + f}"
            )


def spans_of(length: int, tile: int, overlap: int) -> list[Span]:
    """Return evenly spaced spans of length `tile` that cover an axis and overlap by `overlap`.

    Spans may overlap by more than `overlap`.
    """
    if length <= tile:
        return [(0, length)]
    number = math.ceil((length - overlap) / (tile - overlap))
    starts = [round(i * (length - tile) / (number - 1)) for i in range(number)]
    return [(start, start + tile) for start in starts]


def ramps_of(spans: list[Span], scale: int) -> list[Tensor]:
    """Return the float32 blending weights of each span; at each position they sum to 1.

    Weights are linear within an overlap. `scale` is the number of positions per unit of a span.
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
    """Apply `function` to tiles of x, and blend the results.

    A latent position corresponds to `down` positions of x and `up` positions of the result along
    each axis. `tiles` holds the side of a tile and the minimum overlap in latent positions.
    """
    rows, columns = (spans_of(side // down, *tiles) for side in x.shape[2:])
    if len(rows) == len(columns) == 1:
        return function(x)
    out: Tensor | None = None
    dtype = x.dtype
    for (top, bottom), row_weights in zip(rows, ramps_of(rows, up), strict=True):
        for (left, right), column_weights in zip(columns, ramps_of(columns, up), strict=True):
            part = x[:, :, top * down : bottom * down, left * down : right * down]
            result = function(part)
            dtype = result.dtype
            if out is None:  # at least float32, since it accumulates a sum
                shape = (*result.shape[:2], rows[-1][1] * up, columns[-1][1] * up)
                sum_dtype = torch.promote_types(dtype, torch.float32)
                out = torch.zeros(shape, dtype=sum_dtype, device=result.device)
            weights = row_weights[:, None] * column_weights
            target = out[:, :, top * up : bottom * up, left * up : right * up]
            target += result * weights.to(result.device)
    assert out is not None
    return out.to(dtype)
