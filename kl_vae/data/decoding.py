"""Decode image files and `.npy` files: open, check the size, decode, convert to a tensor.

There is one path for all: `read_image_from` reads any stream, `read_image` a file. What the
decoded pixels mean is decided in `kl_vae.data.pixels`.

Shapes: C channels, H height, W width.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, GifImagePlugin, Image, ImageFile, JpegImagePlugin, TiffImagePlugin
from torch import Tensor

from kl_vae.data.pixels import EVERYTHING, Wanted, array_to_tensor, pil_to_tensor
from kl_vae.runtime.files import display_name

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_EXTENSIONS = (".npy",)
# formats by their first bytes, since wrong extensions are common; Pillow's other readers stay out
# (that of EPS, say, starts Ghostscript)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# where Pillow refuses, too: 512 MiB as RGB
MAX_PIXELS = 178_956_970
# of an uncompressed TIFF: 179 million pixels in tiles of 32 x 32 have fewer
MAX_TILES = 2**18

TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A file that cannot be used as an image; the text is `PATH: reason`, in one line."""


# --- files and streams


def read_image(
    path: str | os.PathLike[str],
    channels: int,
    max_pixels: int = MAX_PIXELS,
    wanted: Wanted = EVERYTHING,
) -> Tensor:
    """Decode a file into [C,H,W], in memory [H,W,C] as it is in the file.

    An image file gives uint8 with C = 1, 3 or 4: its EXIF orientation applied,
    the first frame of several, transparency composited on white where C is not 4.
    A `.npy` file of [H,W,C] (or [H,W] where C is 1) gives uint8 as stored;
    uint16 and floats in [0, 1] give float32 in [0, 1].

    Where less than everything is `wanted`, less is converted, and a JPEG may be decoded smaller.

    This takes at most 100 MB of memory and, for an image file, 24 bytes per pixel of
    `max_pixels` and 50 per byte of the file; for a `.npy` file its size and 4 bytes per value.

    Raises:
        ImageError: whatever keeps the file from being used, a damaged file as
            well as one with more than `max_pixels` pixels (checked before decoding).
    """
    opened = partial(_open_file, Path(path))
    return read_image_from(opened, display_name(path), channels, max_pixels, wanted)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (height, width) as `read_image` would give them, from the file's header alone.

    Raises:
        ImageError: the file is not an image that `read_image` knows.
    """
    return read_size_from(partial(_open_file, Path(path)), display_name(path))


def read_image_from(
    open_stream: Callable[[], BinaryIO],
    name: str,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    wanted: Wanted = EVERYTHING,
) -> Tensor:
    """Decode a stream, such as a part of a larger file, as `read_image` decodes a file.

    Args:
        open_stream: opens the stream, which can seek; its errors are the image's.
        name: of the image in errors; where it ends in `.npy`, the stream holds an array.
        channels: C.
        max_pixels: larger images are refused before they are decoded.
        wanted: as in `read_image`.

    Raises:
        ImageError: as in `read_image`.
    """
    with _errors_named(name), open_stream() as stream:
        _check_not_empty(stream)
        if _is_array(name):
            return wanted.cut(array_to_tensor(_read_array(stream, max_pixels), channels))
        return pil_to_tensor(_decode(stream, max_pixels, wanted.short_side), channels, wanted)


def read_size_from(open_stream: Callable[[], BinaryIO], name: str) -> tuple[int, int]:
    """Return (height, width) of the image in a stream; see `read_image_from` and `read_size`."""
    with _errors_named(name), open_stream() as stream:
        _check_not_empty(stream)
        if _is_array(name):
            shape, _, _ = _read_array_header(stream)
            return shape[0], shape[1]
        image = _open_image(stream)
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def _open_file(path: Path) -> BinaryIO:
    # before opening: to open a named pipe is to wait for its writer
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    return path.open("rb")


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Turn every error into an `ImageError` that names the file, and drop Pillow's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: more pixels than Pillow reads of a TIFF, WebP or GIF, whatever "
            "max_pixels is: make it smaller, save it as PNG, or leave the file out"
        ) from error
    except Exception as error:  # on damaged files Pillow raises nearly every type there is
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # printable, since the reason may quote the file
        reason = display_name(" ".join(reason.split()))
        raise ImageError(f"{name}: {reason}") from error


def _is_array(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ARRAY_EXTENSIONS


def _check_not_empty(stream: BinaryIO) -> None:
    if not stream.read(1):
        raise ValueError("the file is empty")
    stream.seek(0)


def _check_pixels(height: int, width: int, max_pixels: int, what: str = "") -> None:
    if height * width > max_pixels:
        raise ValueError(
            f"{what}{width} x {height} pixels are more than max_pixels={max_pixels}: "
            "raise max_pixels, or leave the file out"
        )


# --- image files


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF with a limit of tiles or strips, which a file may list by the million.

    Pillow makes objects of 300 bytes for each, while it reads the header.
    """

    def _setup(self) -> None:
        for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS):
            number = len(self.tag_v2.get(tag, ()))
            if number > MAX_TILES:
                raise ValueError(
                    f"{number} tiles or strips are more than {MAX_TILES}: save it with larger ones"
                )
        super()._setup()


class _Gif(GifImagePlugin.GifImageFile):
    """A GIF's first frame, which nothing replaces.

    Pillow makes what replaces it, of any size, while it reads the header.
    """

    disposal_method = property(lambda self: 0, lambda self, method: None)


def _open_image(stream: BinaryIO) -> ImageFile.ImageFile:
    """Read the header; as `Image.open`, but with no limit of pixels, which is global there."""
    Image.init()  # fills Image.OPEN, once
    prefix = stream.read(16)
    for name in FORMATS:
        reader, accepts = Image.OPEN[name]
        if accepts is None or accepts(prefix) is True:
            stream.seek(0)
            # no file name, by which Pillow would map a file that may not begin with the image
            return {"TIFF": _Tiff, "GIF": _Gif}.get(name, reader)(stream, "")
    raise ValueError(f"not an image: the bytes are none of {', '.join(FORMATS)}")


def _decode(stream: BinaryIO, max_pixels: int, short_side: int | None) -> Image.Image:
    """Read the pixels and apply the EXIF orientation; see `Wanted` for `short_side`."""
    image = _open_image(stream)
    _check_pixels(image.height, image.width, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiles(image, max_pixels)
    if short_side is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        _draft(image, short_side)
    method = TRANSPOSE_BY_ORIENTATION.get(_orientation(image))
    image.load()
    return image if method is None else image.transpose(method)


def _check_tiles(image: TiffImagePlugin.TiffImageFile, max_pixels: int) -> None:
    """Limit the size of a tile: one takes memory, however small the image is."""
    tags = (TiffImagePlugin.TILELENGTH, TiffImagePlugin.TILEWIDTH)
    height, width = (image.tag_v2.get(tag, 1) for tag in tags)
    if not (isinstance(height, int) and isinstance(width, int)):
        raise ValueError("the size of its tiles is no number: the file is damaged")
    _check_pixels(height, width, max_pixels, "tiles of ")


def _draft(image: JpegImagePlugin.JpegImageFile, short_side: int) -> None:
    """Let a JPEG be decoded at an eighth, a quarter or half of its size, in that much less time.

    Its short side is then `short_side` pixels or more. This is done only where both sides can be
    divided so: the aspect, and with it all that follows, stays what it was. Before `load`.
    """
    width, height = image.size
    for fraction in (8, 4, 2):
        smaller = (width // fraction, height // fraction)
        if width % fraction == height % fraction == 0 and min(smaller) >= short_side:
            image.draft(None, smaller)
            assert image.size == smaller
            return


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation, 1 to 8, that is yet to be applied; before `load`."""
    if image.format == "TIFF":  # its reader applies the orientation, to `size` as well
        return 1
    try:
        # not image.getexif(): to look for a late EXIF block, PNG's decodes all pixels
        number = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # an image with damaged EXIF is still an image
        return 1
    return number if number in TRANSPOSE_BY_ORIENTATION else 1


# --- arrays


def _read_array(stream: BinaryIO, max_pixels: int) -> NDArray[np.generic]:
    """Return the [H,W] or [H,W,C] of a `.npy` file."""
    shape, fortran_order, dtype = _read_array_header(stream)
    _check_pixels(shape[0], shape[1], max_pixels)
    content = stream.read(prod(shape) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")


def _read_array_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, fortran_order, dtype), and leave the stream at the values.

    Pickled objects are refused, and an array of which values are missing.
    """
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"the array's format is {version}: save it with numpy.save")
    if dtype.hasobject:
        raise ValueError(f"the array is {dtype}: save uint8, uint16, or floats in [0, 1]")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(
            f"the array's shape is {shape}: save [height, width] or [height, width, channels]"
        )
    start, needed = stream.tell(), prod(shape) * dtype.itemsize
    stored = stream.seek(0, os.SEEK_END) - start
    if stored < needed:
        raise ValueError(f"the array takes {needed} bytes, and there are {stored}: save it again")
    stream.seek(start)
    return shape, fortran_order, dtype
