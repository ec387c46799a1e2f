"""What stored pixels mean: from Pillow images and arrays to tensors, and to a model's values.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# shows through transparency: white, as on a page
BACKGROUND = 255
MODE_BY_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# pixels of a tile: as floats they fit into a processor's cache, and no buffer is as large as an
# image, for which the system would give new pages, and clear them
TILE_PIXELS = 2**15


class Wanted(NamedTuple):
    """The part of an image that a reader wants, so that no more is decoded and converted.

    Attributes:
        short_side: a JPEG may be decoded smaller, its short side no less than this. None: as large
            as it is stored.
        region: called once with (height, width) of the image, returns the wanted rows and columns;
            its ValueError is the image's. None: all.
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


# --- from an image file's pixels


def pil_to_tensor(image: Image.Image, channels: int, wanted: Wanted = EVERYTHING) -> Tensor:
    """Convert a Pillow image of any mode to uint8 [C,H,W]: grey, RGB or RGBA.

    In memory it is [H,W,C], as it was decoded: to resize, cut and stack that is faster.

    Grey is ITU-R 601 luminance. Transparency is composited on white, or kept
    where `channels` is 4. 16-bit greys are scaled to 8 bits by their value.
    A wanted region has the values that it has in the whole image.
    Beside the image and the result this takes memory for one tile.

    Raises:
        ValueError: `channels` is not 1, 3 or 4, or float pixels have no known range.
    """
    if channels not in MODE_BY_CHANNELS:
        raise ValueError(
            f"an image file gives 1, 3 or 4 channels, not {channels}: "
            f"save [height, width, {channels}] arrays as .npy"
        )
    white = _white(image) if image.mode.startswith(("I", "F")) else None
    wanted_rows, wanted_columns = wanted.places(image.height, image.width)
    top, left = wanted_rows.start, wanted_columns.start
    height, width = wanted_rows.stop - top, wanted_columns.stop - left
    converted = np.empty((height, width) if channels == 1 else (height, width, channels), np.uint8)
    for rows, columns in _tiles(height, width):
        box = (left + columns.start, top + rows.start, left + columns.stop, top + rows.stop)
        tile = image if box == (0, 0, *image.size) else image.crop(box)
        if white is not None:
            tile = _deep_grey_to_8_bits(tile, white)
        converted[rows, columns] = np.asarray(_in_mode_of(channels, tile))
    result = torch.from_numpy(converted)  # [H,W] or [H,W,C]
    return result[None] if channels == 1 else result.permute(2, 0, 1)


def _in_mode_of(channels: int, image: Image.Image) -> Image.Image:
    mode = MODE_BY_CHANNELS[channels]
    if image.has_transparency_data:
        image = _converted(image, "RGBA")
        if channels != 4:
            opaque = Image.new("RGB", image.size, (BACKGROUND,) * 3)
            opaque.paste(image, mask=image.getchannel("A"))
            image = opaque
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # the one mode to which every colour space converts
    return _converted(image, mode)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which would copy


def _white(image: Image.Image) -> int:
    """Return the value that stands for white in I;16* and I (16 bits) and F (0..1 or 0..255)."""
    ranges = []
    for rows, columns in _tiles(image.height, image.width):
        values = np.array(image.crop((columns.start, rows.start, columns.stop, rows.stop)))
        ranges.append((values.min(), values.max()))
    low, high = np.min(ranges), np.max(ranges)
    if image.mode != "F":
        if low < 0 or high > 65535:
            raise ValueError(f"integer pixels are from {low} to {high}: save them in 0..65535")
        return 65535
    if not (low >= 0 and high <= 255):  # NaN fails as well
        raise ValueError(f"float pixels are from {low:g} to {high:g}: save them in 0..1 or 0..255")
    return 1 if high <= 1 else 255


def _deep_grey_to_8_bits(image: Image.Image, white: int) -> Image.Image:
    """Map greys from 0 to `white` to L, or to LA with transparency."""
    values = np.array(image)  # [H,W]
    if white == 65535:
        grey = (values.astype(np.int32) + 128) // 257  # 65535 = 255 * 257
    else:
        grey = np.rint(values * (255 / white))
    grey_image = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")  # the one value that stands for "nothing here"
    if transparent is not None:
        grey_image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype("u1")))
    return grey_image


# --- from an array's values


def array_to_tensor(stored: NDArray[np.generic], channels: int) -> Tensor:
    """Convert [H,W] or [H,W,C] to [C,H,W]: uint8 as stored; uint16 and floats as float32 in [0, 1].

    Raises:
        ValueError: another number of channels, another dtype, or floats outside [0, 1].
    """
    array = stored[:, :, None] if stored.ndim == 2 else stored
    height, width, stored_channels = array.shape
    if stored_channels != channels:
        raise ValueError(
            f"the array's shape is {stored.shape}; {channels} channels need "
            f"[height, width, {channels}]{' or [height, width]' if channels == 1 else ''}"
        )
    dtype = array.dtype.newbyteorder("=")  # torch knows no other
    floating = np.issubdtype(dtype, np.floating)
    if not (floating or dtype in (np.uint8, np.uint16)):
        raise ValueError(f"the array is {dtype}: save uint8, uint16, or floats in [0, 1]")
    image = torch.empty(
        channels, height, width, dtype=torch.uint8 if dtype == np.uint8 else torch.float32
    )
    ranges = []
    for rows, columns in _tiles(height, width):
        values = array[rows, columns].astype(dtype)  # [h,w,C]
        if floating:
            ranges.append((values.min(), values.max()))
        if dtype != np.uint8:
            values = values.astype(np.float32)
        image[:, rows, columns] = torch.from_numpy(values.transpose(2, 0, 1))
    if floating:
        low, high = np.min(ranges), np.max(ranges)
        if not (np.isfinite(low) and np.isfinite(high)):  # with a NaN anywhere both are NaN
            raise ValueError("the array holds NaN or infinity: save floats in [0, 1]")
        if low < 0 or high > 1:
            raise ValueError(
                f"the array's values are from {low:g} to {high:g}: scale them to [0, 1] and save "
                "again"
            )
    return image.div_(65535) if dtype == np.uint16 else image


def _tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of each tile of an image: whole rows, unless one is too long."""
    columns = min(width, TILE_PIXELS)
    rows = TILE_PIXELS // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, min(top + rows, height)), slice(left, min(left + columns, width))


# --- to a model's values, and back; tensors of any shape


def to_float(image: Tensor) -> Tensor:
    """Map uint8, or floats in [0, 1], to float32 in [-1, 1]: to the same bits on any device."""
    if image.dtype != torch.uint8:
        return image.float() * 2 - 1
    # by a tensor: CUDA multiplies by the reciprocal of a number, which rounds differently
    half = torch.full((), 127.5, dtype=torch.float32, device=image.device)
    return (image / half).sub_(1)


def normalized(images: Tensor) -> Tensor:
    """Return what a `Sample` or a `Batch` holds as float32 in [-1, 1], on the device it is on."""
    return to_float(images) if images.dtype == torch.uint8 else images


def to_uint8(image: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8, rounded; what lies outside is clamped."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
