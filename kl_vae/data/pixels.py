"""Conversion of Pillow images and arrays to tensors, and of tensors to the model's value range.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kl_vae.data.color import to_srgb
from kl_vae.data.pixel_format import (
    ALL,
    PixelFormat,
    Range,
    as_uint8,
    as_unit_float,
    black_and_white,
)

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


class Stored(NamedTuple):
    """The samples of an image as its file stores them.

    Attributes:
        values: [H,W,C].
        mode: Pillow's mode of the samples as 8 bits (`L`, `LA`, `La`, `RGB`, `RGBA`, `RGBa`,
            `CMYK`; `a` is premultiplied alpha); None: bands that are no colours.
        bits: depth that the file states, if it is not that of the dtype.
        inverted: whether the lowest value is white.
        profile: the ICC profile.
        transparent: value, or values per colour, of transparent pixels.
    """

    values: NDArray[Any]
    mode: str | None
    bits: int | None = None
    inverted: bool = False
    profile: bytes | None = None
    transparent: Any = None

    @staticmethod
    def of(image: Image.Image) -> Stored:
        """Return the samples of a Pillow image of any mode."""
        mode = image.mode
        if mode.startswith(("I", "F")):
            mode = "L"
        elif mode not in ("L", "LA", "La", "RGB", "RGBA", "RGBa", "CMYK"):
            mode = "RGBA" if image.has_transparency_data else "RGB"
            image = image.convert(mode)
        values = np.array(image)
        if values.dtype == np.int32 and values.min() >= 0 and values.max() <= 65535:
            values = values.astype(np.uint16)  # mode I, of 16 bits in the file
        return Stored(
            values if values.ndim == 3 else values[:, :, None],
            mode,
            profile=image.info.get("icc_profile"),
            transparent=image.info.get("transparency"),
        )

    def as_image(self, rows: slice, columns: slice, black_white: Range) -> Image.Image:
        """Return a tile as a Pillow image of 8 bits."""
        values = self.values[rows, columns]
        scaled = as_uint8(values, black_white, self.inverted)
        assert self.mode is not None
        size = (scaled.shape[1], scaled.shape[0])
        image = Image.frombytes(self.mode, size, np.ascontiguousarray(scaled).tobytes())
        if self.transparent is not None:
            opaque = (values != np.array(self.transparent)).any(axis=2)
            image.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
        return image


# --- Pillow images


def pil_to_tensor(
    image: Image.Image,
    channels: int,
    wanted: Wanted = WHOLE_IMAGE,
    pixel_format: PixelFormat = PixelFormat(),  # noqa: B008
    name: str = "the image",
) -> Tensor:
    """Convert a Pillow image of any mode to uint8 [C,H,W], channels-last in memory.

    Colours are converted to sRGB by the ICC profile of the image, and to grey by ITU-R 601
    luminance. Transparency is composited on white, or kept if `channels` is 4. 16-bit and float
    greys are scaled to 8 bits. Memory use is the image, the result and one tile.

    Args:
        image: an image of any mode.
        channels: 1 (greyscale), 3 (RGB) or 4 (RGBA).
        wanted: the region to convert.
        pixel_format: values of black and white.
        name: of the image in warnings.

    Raises:
        ValueError: the image does not have this number of channels, or a value is outside the
            range.
    """
    rescaled = ALL in pixel_format.ranges or "uint8" in pixel_format.ranges
    if rescaled or image.mode.startswith(("I", "F")) or channels not in MODE_BY_CHANNELS:
        return stored_to_tensor(Stored.of(image), channels, wanted, pixel_format, name)
    profile = image.info.get("icc_profile")

    def tile(rows: slice, columns: slice) -> NDArray[np.uint8]:
        box = (columns.start, rows.start, columns.stop, rows.stop)
        part = image if box == (0, 0, *image.size) else image.crop(box)
        return np.asarray(_convert_channels(channels, part, profile, name))

    return _assemble(tile, channels, *wanted.bounds(image.height, image.width))


def stored_to_tensor(
    stored: Stored,
    channels: int,
    wanted: Wanted = WHOLE_IMAGE,
    pixel_format: PixelFormat = PixelFormat(),  # noqa: B008
    name: str = "the image",
) -> Tensor:
    """Convert the samples of a file to uint8 [C,H,W]; see `pil_to_tensor`.

    Bands that are no colours, and any number of channels other than 1, 3 or 4, are kept as they
    are stored; their number must be `channels`.

    Raises:
        ValueError: as `pil_to_tensor`.
    """
    height, width, bands = stored.values.shape
    as_colors = stored.mode is not None and channels in MODE_BY_CHANNELS
    if not as_colors and bands != channels:
        raise ValueError(
            f"the file has {bands} bands, and the model {channels} channels: set "
            f"model.params.ddconfig.in_channels={bands} (and out_ch), or save the wanted bands as "
            f".npy [height, width, {channels}]"
        )
    black_white = black_and_white(stored.values, stored.bits, pixel_format.ranges)

    def tile(rows: slice, columns: slice) -> NDArray[np.uint8]:
        if not as_colors:
            return as_uint8(stored.values[rows, columns], black_white, stored.inverted)
        part = stored.as_image(rows, columns, black_white)
        return np.asarray(_convert_channels(channels, part, stored.profile, name))

    return _assemble(tile, channels, *wanted.bounds(height, width))


def _assemble(
    tile: Callable[[slice, slice], NDArray[np.uint8]], channels: int, rows: slice, columns: slice
) -> Tensor:
    """Return the region of an image as [C,H,W], converted tile by tile."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    converted = np.empty((height, width, channels), np.uint8)
    for down, right in _tiles(height, width):
        part = tile(
            slice(rows.start + down.start, rows.start + down.stop),
            slice(columns.start + right.start, columns.start + right.stop),
        )
        converted[down, right] = part if part.ndim == 3 else part[:, :, None]
    if channels == 1:
        return torch.from_numpy(converted[:, :, 0])[None]
    return torch.from_numpy(converted).permute(2, 0, 1)


def _convert_channels(
    channels: int, image: Image.Image, profile: bytes | None, name: str
) -> Image.Image:
    alpha = None
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    if image.mode == "LA":
        image, alpha = image.getchannel("L"), image.getchannel("A")
    elif image.has_transparency_data:
        image = _convert_mode(image, "RGBA")
        image, alpha = image.convert("RGB"), image.getchannel("A")
    elif image.mode not in ("1", "L", "RGB", "CMYK"):
        image = image.convert("RGB")  # the only mode that Pillow converts every mode to
    image = to_srgb(image, profile, name)
    if alpha is not None and channels == 4:
        image = _convert_mode(image, "RGB")
        image.putalpha(alpha)
    elif alpha is not None:
        opaque = Image.new("RGB", image.size, (BACKGROUND,) * 3)
        opaque.paste(_convert_mode(image, "RGB"), mask=alpha)
        image = opaque
    if channels == 4 and image.mode in ("1", "L"):
        image = image.convert("RGB")
    return _convert_mode(image, MODE_BY_CHANNELS[channels])


def _convert_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # convert() always copies


# --- arrays


def array_to_tensor(
    stored: NDArray[Any],
    channels: int,
    pixel_format: PixelFormat = PixelFormat(),  # noqa: B008
) -> Tensor:
    """Convert an array [H,W], [H,W,C] or [C,H,W] to a tensor [C,H,W].

    uint8 is kept; other numbers are converted to float32 in [0, 1].

    Raises:
        ValueError: the number of channels or the dtype is not supported, or a value is outside the
            range.
    """
    array = stored[:, :, None] if stored.ndim == 2 else stored
    if array.shape[2] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    height, width, stored_channels = array.shape
    if stored_channels != channels:
        raise ValueError(
            f"the array's shape is {stored.shape}; {channels} channels need "
            f"[height, width, {channels}]{' or [height, width]' if channels == 1 else ''}"
        )
    dtype = array.dtype.newbyteorder("=")  # torch supports only the native byte order
    black_white = black_and_white(array, None, pixel_format.ranges)
    eight_bits = dtype == np.uint8
    image = torch.empty(channels, height, width, dtype=torch.uint8 if eight_bits else torch.float32)
    for rows, columns in _tiles(height, width):
        values = array[rows, columns].astype(dtype)  # [h,w,C]
        scaled: NDArray[Any]
        if not eight_bits:
            scaled = as_unit_float(values, black_white)
        else:
            scaled = values if black_white == (0, 255) else as_uint8(values, black_white)
        image[:, rows, columns] = torch.from_numpy(scaled.transpose(2, 0, 1))
    return image


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
