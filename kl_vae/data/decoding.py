"""Decoding of image files and `.npy` files: open, check the size, decode, convert to a tensor.

`read_image_from` reads a stream, `read_image` a file. `kl_vae.data.pixels` converts the decoded
pixels to tensors.

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

from kl_vae.data.pixels import WHOLE_IMAGE, Wanted, array_to_tensor, pil_to_tensor
from kl_vae.runtime.files import display_name

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_EXTENSIONS = (".npy",)
# formats are detected by content, because wrong extensions are common. Pillow's other readers are
# not used: the EPS reader, for example, runs Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# same limit as Pillow's: 512 MiB as RGB
MAX_PIXELS = 178_956_970
# maximum number of tiles or strips of a TIFF; MAX_PIXELS in 32 x 32 tiles are fewer
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
    """Error for a file that cannot be used as an image; the message is one line, `PATH: reason`."""


# --- files and streams


def read_image(
    path: str | os.PathLike[str],
    channels: int,
    max_pixels: int = MAX_PIXELS,
    wanted: Wanted = WHOLE_IMAGE,
) -> Tensor:
    """Decode a file to [C,H,W].

    An image file is decoded to uint8 with C = 1, 3 or 4. Its EXIF orientation is applied, only the
    first frame is read, and transparency is composited on white unless C is 4. The memory layout
    is channels-last.

    A `.npy` file contains [H,W,C], or [H,W] if C is 1. uint8 is returned as stored; uint16 and
    floats in [0, 1] are converted to float32 in [0, 1].

    Peak memory is at most 100 MB plus, for an image file, 24 bytes per pixel of `max_pixels` and
    50 bytes per byte of the file; for a `.npy` file, its size and 4 bytes per value.

    Args:
        path: the file.
        channels: C.
        max_pixels: maximum number of pixels, checked before decoding.
        wanted: the region to convert, and the minimum size to decode a JPEG at.

    Raises:
        ImageError: The file cannot be read, is damaged, or has more than `max_pixels` pixels.
    """
    opened = partial(_open_file, Path(path))
    return read_image_from(opened, display_name(path), channels, max_pixels, wanted)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (height, width) of the image that `read_image` returns, from the file's header.

    Raises:
        ImageError: The file cannot be read or is not in a format that `read_image` supports.
    """
    return read_size_from(partial(_open_file, Path(path)), display_name(path))


def read_image_from(
    open_stream: Callable[[], BinaryIO],
    name: str,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    wanted: Wanted = WHOLE_IMAGE,
) -> Tensor:
    """Decode a stream to [C,H,W], in the same way as `read_image` decodes a file.

    Args:
        open_stream: opens a seekable stream; its errors are raised as ImageError.
        name: of the image in error messages; if it ends in `.npy`, the stream contains an array.
        channels: C.
        max_pixels: maximum number of pixels, checked before decoding.
        wanted: as in `read_image`.

    Raises:
        ImageError: as in `read_image`.
    """
    with _image_errors(name), open_stream() as stream:
        _check_not_empty(stream)
        if _is_array(name):
            return wanted.cut(array_to_tensor(_read_array(stream, max_pixels), channels))
        return pil_to_tensor(_decode(stream, max_pixels, wanted.short_side), channels, wanted)


def read_size_from(open_stream: Callable[[], BinaryIO], name: str) -> tuple[int, int]:
    """Return (height, width) of the image in a stream; see `read_image_from` and `read_size`."""
    with _image_errors(name), open_stream() as stream:
        _check_not_empty(stream)
        if _is_array(name):
            shape, _, _ = _read_array_header(stream)
            return shape[0], shape[1]
        image = _open_image(stream)
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def _open_file(path: Path) -> BinaryIO:
    # checked before opening, because opening a named pipe blocks until it has a writer
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    return path.open("rb")


@contextmanager
def _image_errors(name: str) -> Iterator[None]:
    """Convert every error to an `ImageError` with the file name; suppress Pillow's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: exceeds Pillow's own pixel limit for TIFF, WebP and GIF, which max_pixels "
            "does not change: make the image smaller, save it as PNG, or exclude the file"
        ) from error
    except Exception as error:  # Pillow raises many different types for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # the reason may contain unprintable bytes of the file
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
            "increase max_pixels, or exclude the file"
        )


# --- image files


class _Tiff(TiffImagePlugin.TiffImageFile):
    """TIFF reader with a limit on the number of tiles or strips.

    Pillow allocates 300 bytes for each of them while it reads the header, and a damaged file may
    list millions.
    """

    def _setup(self) -> None:
        for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS):
            number = len(self.tag_v2.get(tag, ()))
            if number > MAX_TILES:
                raise ValueError(
                    f"{number} tiles or strips are more than {MAX_TILES}: save the image with "
                    "larger ones"
                )
        super()._setup()


class _Gif(GifImagePlugin.GifImageFile):
    """GIF reader for the first frame only, without a disposal method.

    With one, Pillow allocates the image that replaces the frame while it reads the header.
    """

    disposal_method = property(lambda self: 0, lambda self, method: None)


def _open_image(stream: BinaryIO) -> ImageFile.ImageFile:
    """Read the header, like `Image.open` but without its global pixel limit."""
    Image.init()  # fills Image.OPEN on the first call
    prefix = stream.read(16)
    for name in FORMATS:
        reader, accepts = Image.OPEN[name]
        if accepts is None or accepts(prefix) is True:
            stream.seek(0)
            # no file name: Pillow would map the file, in which the image may have an offset
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
    """Check the tile size: a tile is allocated as a whole, even if the image is smaller."""
    tags = (TiffImagePlugin.TILELENGTH, TiffImagePlugin.TILEWIDTH)
    height, width = (image.tag_v2.get(tag, 1) for tag in tags)
    if not (isinstance(height, int) and isinstance(width, int)):
        raise ValueError("the tile size is not an integer: the file is damaged")
    _check_pixels(height, width, max_pixels, "tiles of ")


def _draft(image: JpegImagePlugin.JpegImageFile, short_side: int) -> None:
    """Set the decoder of a JPEG to 1/8, 1/4 or 1/2 of its size; call this before `load`.

    The short side remains at least `short_side` pixels. A scale is used only if it divides both
    sides exactly, so that the aspect ratio does not change.
    """
    width, height = image.size
    for fraction in (8, 4, 2):
        smaller = (width // fraction, height // fraction)
        if width % fraction == height % fraction == 0 and min(smaller) >= short_side:
            image.draft(None, smaller)
            assert image.size == smaller
            return


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation, 1 to 8, that remains to be applied; call this before `load`."""
    if image.format == "TIFF":  # Pillow applies the orientation to pixels and `size`
        return 1
    try:
        # not image.getexif(): for PNG it decodes all pixels to find an EXIF chunk after them
        number = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # an image with damaged EXIF is still usable
        return 1
    return number if number in TRANSPOSE_BY_ORIENTATION else 1


# --- arrays


def _read_array(stream: BinaryIO, max_pixels: int) -> NDArray[np.generic]:
    """Return the array [H,W] or [H,W,C] of a `.npy` file."""
    shape, fortran_order, dtype = _read_array_header(stream)
    _check_pixels(shape[0], shape[1], max_pixels)
    content = stream.read(prod(shape) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")


def _read_array_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, fortran_order, dtype), and leave the stream at the start of the values.

    Raises:
        ValueError: The array contains Python objects, is truncated, or has an unsupported shape
            or format version.
    """
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"the array's format version is {version}: save it with numpy.save")
    if dtype.hasobject:
        raise ValueError(f"the array is {dtype}: save uint8, uint16, or floats in [0, 1]")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(
            f"the array's shape is {shape}: save [height, width] or [height, width, channels]"
        )
    start, needed = stream.tell(), prod(shape) * dtype.itemsize
    stored = stream.seek(0, os.SEEK_END) - start
    if stored < needed:
        raise ValueError(f"the array needs {needed} bytes but the file has {stored}: save it again")
    stream.seek(start)
    return shape, fortran_order, dtype
