"""Decode one file, or a part of one, into an image tensor.

Shapes: C channels, H height, W width.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from torch import Tensor

from kl_vae.data.arrays import array_size, read_array
from kl_vae.data.pil_modes import pil_to_tensor
from kl_vae.data.readers import draft, load_upright, open_image, orientation, tile_size
from kl_vae.data.wanted import EVERYTHING, Wanted
from kl_vae.runtime.files import display_name

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_EXTENSIONS = (".npy",)
# where Pillow refuses, too: 512 MiB as RGB
MAX_PIXELS = 178_956_970


class ImageError(ValueError):
    """A file that cannot be used as an image; the text is `PATH: reason`, in one line."""


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (height, width) as `read_image` would give them, from the file's header alone.

    Raises:
        ImageError: the file is not an image that `read_image` knows.
    """
    path = Path(path)
    with _errors_named(display_name(path)):
        _check_regular(path)
        if _is_array(path.name):
            return array_size(path)
        with path.open("rb") as stream:
            return _picture_size(stream, os.fspath(path))


def read_size_from(open_stream: Callable[[], BinaryIO], name: str) -> tuple[int, int]:
    """`read_size` of what a stream holds; see `read_image_from`."""
    with _errors_named(name), open_stream() as stream:
        _check_not_empty(stream)
        return array_size(stream) if _is_array(name) else _picture_size(stream, "")


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

    This takes at most 100 MB of memory and, for an image file, 24 bytes a pixel of
    `max_pixels` and 50 a byte of the file; for a `.npy` file its size and 4 bytes a value.

    Raises:
        ImageError: whatever keeps the file from being used, a damaged file as
            well as one with more than `max_pixels` pixels (checked before decoding).
    """
    path = Path(path)
    with _errors_named(display_name(path)):
        _check_regular(path)
        if _is_array(path.name):
            return wanted.cut(_read_array(path, channels, max_pixels))
        with path.open("rb") as stream:
            image = _decode(stream, os.fspath(path), max_pixels, wanted)
            return pil_to_tensor(image, channels, wanted)


def read_image_from(
    open_stream: Callable[[], BinaryIO],
    name: str,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    wanted: Wanted = EVERYTHING,
) -> Tensor:
    """`read_image` of what a stream holds, such as a part of a larger file.

    Args:
        open_stream: opens the stream, which can seek; its errors are the image's.
        name: what an error calls the image; where it ends in `.npy`, the stream holds an array.
        channels: C.
        max_pixels: larger images are refused before they are decoded.
        wanted: as in `read_image`.

    Raises:
        ImageError: as in `read_image`.
    """
    with _errors_named(name), open_stream() as stream:
        _check_not_empty(stream)
        if _is_array(name):
            return wanted.cut(_read_array(stream, channels, max_pixels))
        return pil_to_tensor(_decode(stream, "", max_pixels, wanted), channels, wanted)


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


def _check_regular(path: Path) -> None:
    # before opening: to open a named pipe is to wait for its writer
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size == 0:
        raise ValueError("the file is empty")


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


def _read_array(file: Path | BinaryIO, channels: int, max_pixels: int) -> Tensor:
    _check_pixels(*array_size(file), max_pixels)
    return read_array(file, channels)


def _picture_size(stream: BinaryIO, filename: str) -> tuple[int, int]:
    image = open_image(stream, filename)
    width, height = image.size
    return (width, height) if orientation(image) >= 5 else (height, width)


def _decode(stream: BinaryIO, filename: str, max_pixels: int, wanted: Wanted) -> Image.Image:
    image = open_image(stream, filename)
    _check_pixels(image.height, image.width, max_pixels)
    _check_pixels(*tile_size(image), max_pixels, "tiles of ")
    if wanted.short_side is not None:
        draft(image, wanted.short_side)
    return load_upright(image)
