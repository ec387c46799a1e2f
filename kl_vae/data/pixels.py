"""Conversion of Pillow images and arrays to tensors, and of tensors to the model's value range.

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

# white, composited behind transparent pixels
BACKGROUND = 255
MODE_BY_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# pixels per tile: a tile of floats fits into the CPU cache, and small buffers are reused, whereas
# the system maps and clears new pages for a buffer of the size of an image
TILE_PIXELS = 2**15


class Wanted(NamedTuple):
    """The region and the minimum size of an image that the caller needs, to decode no more.

    Attributes:
        short_side: minimum short side in pixels that a JPEG is decoded at; None: full size.
        region: function from (height, width) of the image to the rows and columns to read, called
            once; it may raise ValueError for an unsuitable image. None: the whole image.
    """

    short_side: int | None = None
    region: Callable[[int, int], tuple[slice, slice]] | None = None

    def bounds(self, height: int, width: int) -> tuple[slice, slice]:
        """Return the rows and columns as slices with start and stop."""
        if self.region is None:
            return slice(0, height), slice(0, width)
        return self.region(height, width)

    def cut(self, image: Tensor) -> Tensor:
        """Return the region of an image [C,H,W]."""
        rows, columns = self.bounds(*image.shape[1:])
        return image[:, rows, columns]


WHOLE_IMAGE = Wanted()


# --- Pillow images


def pil_to_tensor(image: Image.Image, channels: int, wanted: Wanted = WHOLE_IMAGE) -> Tensor:
    """Convert a Pillow image of any mode to uint8 [C,H,W], channels-last in memory.

    Colour is converted to grey by ITU-R 601 luminance. Transparency is composited on white, or kept
    if `channels` is 4. 16-bit and float greys are scaled to 8 bits; the range of floats, 0..1 or
    0..255, is determined over the whole image. Memory use is the image, the result and one tile.

    Args:
        image: an image of any mode.
        channels: 1 (greyscale), 3 (RGB) or 4 (RGBA).
        wanted: the region to convert.

    Raises:
        ValueError: `channels` is not 1, 3 or 4, or the pixel values have an unsupported range.
    """
    if channels not in MODE_BY_CHANNELS:
        raise ValueError(
            f"image files can be read with 1, 3 or 4 channels, not {channels}: "
            f"save [height, width, {channels}] arrays as .npy"
        )
    white = _white(image) if image.mode.startswith(("I", "F")) else None
    wanted_rows, wanted_columns = wanted.bounds(image.height, image.width)
    top, left = wanted_rows.start, wanted_columns.start
    height, width = wanted_rows.stop - top, wanted_columns.stop - left
    converted = np.empty((height, width) if channels == 1 else (height, width, channels), np.uint8)
    for rows, columns in _tiles(height, width):
        box = (left + columns.start, top + rows.start, left + columns.stop, top + rows.stop)
        tile = image if box == (0, 0, *image.size) else image.crop(box)
        if white is not None:
            tile = _scale_to_8_bits(tile, white)
        converted[rows, columns] = np.asarray(_convert_channels(channels, tile))
    result = torch.from_numpy(converted)  # [H,W] or [H,W,C]
    return result[None] if channels == 1 else result.permute(2, 0, 1)


def _convert_channels(channels: int, image: Image.Image) -> Image.Image:
    mode = MODE_BY_CHANNELS[channels]
    if image.has_transparency_data:
        image = _convert_mode(image, "RGBA")
        if channels != 4:
            opaque = Image.new("RGB", image.size, (BACKGROUND,) * 3)
            opaque.paste(image, mask=image.getchannel("A"))
            image = opaque
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # the only mode that Pillow converts every mode to
    return _convert_mode(image, mode)


def _convert_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # convert() always copies


def _white(image: Image.Image) -> int:
    """Return the value of white in modes I;16* and I (16 bits) and F (0..1 or 0..255)."""
    ranges = []
    for rows, columns in _tiles(image.height, image.width):
        values = np.array(image.crop((columns.start, rows.start, columns.stop, rows.stop)))
        ranges.append((values.min(), values.max()))
    low, high = np.min(ranges), np.max(ranges)
    if image.mode != "F":
        if low < 0 or high > 65535:
            raise ValueError(
                f"integer pixels range from {low} to {high}: save them in the range 0..65535"
            )
        return 65535
    if not (low >= 0 and high <= 255):  # NaN fails as well
        raise ValueError(
            f"float pixels range from {low:g} to {high:g}: save them in the range 0..1 or 0..255"
        )
    return 1 if high <= 1 else 255


def _scale_to_8_bits(image: Image.Image, white: int) -> Image.Image:
    """Scale grey values from 0..`white` to mode L, or to LA if the image has transparency."""
    values = np.array(image)  # [H,W]
    if white == 65535:
        grey = (values.astype(np.int32) + 128) // 257  # 65535 = 255 * 257
    else:
        grey = np.rint(values * (255 / white))
    grey_image = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")  # the value of transparent pixels
    if transparent is not None:
        grey_image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype("u1")))
    return grey_image


# --- arrays


def array_to_tensor(stored: NDArray[np.generic], channels: int) -> Tensor:
    """Convert an array [H,W] or [H,W,C] to a tensor [C,H,W].

    uint8 is kept; uint16 and floats are converted to float32 in [0, 1].

    Raises:
        ValueError: The number of channels or the dtype is not supported, or floats are outside
            [0, 1].
    """
    array = stored[:, :, None] if stored.ndim == 2 else stored
    height, width, stored_channels = array.shape
    if stored_channels != channels:
        raise ValueError(
            f"the array's shape is {stored.shape}; {channels} channels need "
            f"[height, width, {channels}]{' or [height, width]' if channels == 1 else ''}"
        )
    dtype = array.dtype.newbyteorder("=")  # torch supports only the native byte order
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
        if not (np.isfinite(low) and np.isfinite(high)):  # min and max propagate NaN
            raise ValueError("the array contains NaN or infinity: save floats in [0, 1]")
        if low < 0 or high > 1:
            raise ValueError(
                f"the array's values range from {low:g} to {high:g}: scale them to [0, 1] and save "
                "again"
            )
    return image.div_(65535) if dtype == np.uint16 else image


def _tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of each tile; a tile has full rows unless a row is too long."""
    columns = min(width, TILE_PIXELS)
    rows = TILE_PIXELS // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, min(top + rows, height)), slice(left, min(left + columns, width))


# --- the model's value range; tensors of any shape


def to_float(image: Tensor) -> Tensor:
    """Map uint8, or floats in [0, 1], to float32 in [-1, 1]; bit-exact on all devices."""
    if image.dtype != torch.uint8:
        return image.float() * 2 - 1
    # divide by a tensor: for a Python scalar CUDA multiplies by the reciprocal, which rounds
    # differently
    half = torch.full((), 127.5, dtype=torch.float32, device=image.device)
    return (image / half).sub_(1)


def normalized(images: Tensor) -> Tensor:
    """Convert the images of a `Sample` or a `Batch` to float32 in [-1, 1], on their device."""
    return to_float(images) if images.dtype == torch.uint8 else images


def to_uint8(image: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8 by rounding; values outside are clamped."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
