"""Decode one file into an image tensor.

Shapes: C channels, H height, W width.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from kl_vae.data.arrays import array_size, read_array
from kl_vae.data.pil_modes import pil_to_tensor

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_EXTENSIONS = (".npy",)
# what the bytes may be, whatever the extension says: wrong extensions are common, but
# Pillow's other readers stay out (that of EPS, say, starts Ghostscript)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# where Pillow refuses, too: 512 MiB as RGB
MAX_PIXELS = 178_956_970

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


def display_name(path: str | os.PathLike[str]) -> str:
    """Return a path as text that can be printed in one line, whatever bytes the name holds."""
    name = os.fsencode(path).decode(errors="backslashreplace")
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (height, width) as `read_image` would give them, from the file's header alone.

    Raises:
        ImageError: the file is not an image that `read_image` knows.
    """
    path = Path(path)
    with _errors_named(path):
        _check_regular(path)
        if _is_array(path):
            return array_size(path)
        with path.open("rb") as stream:
            image = _open_image(stream, path)
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)


def read_image(path: str | os.PathLike[str], channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a file into [C,H,W].

    An image file gives uint8 with C = 1, 3 or 4: its EXIF orientation applied,
    the first frame of several, transparency composited on white where C is not 4.
    A `.npy` file of [H,W,C] (or [H,W] where C is 1) gives uint8 as stored;
    uint16 and floats in [0, 1] give float32 in [0, 1].

    Raises:
        ImageError: whatever keeps the file from being used, a damaged file as
            well as one with more than `max_pixels` pixels (checked before decoding).
    """
    path = Path(path)
    with _errors_named(path):
        _check_regular(path)
        if _is_array(path):
            _check_pixels(*array_size(path), max_pixels)
            return read_array(path, channels)
        with path.open("rb") as stream:
            image = _open_image(stream, path)
            _check_pixels(image.height, image.width, max_pixels)
            orientation = _orientation(image)
            image.load()
            method = TRANSPOSE_BY_ORIENTATION.get(orientation)
            return pil_to_tensor(image if method is None else image.transpose(method), channels)


def to_float(image: Tensor) -> Tensor:
    """Map uint8, or floats in [0, 1], to float32 in [-1, 1]; any shape."""
    return image / 127.5 - 1 if image.dtype == torch.uint8 else image.float() * 2 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8, rounded; what lies outside is clamped; any shape."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Turn every error into an `ImageError` that names the file, and drop Pillow's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # on damaged files Pillow raises nearly every type there is
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{display_name(path)}: {' '.join(reason.split())}") from error


def _is_array(path: Path) -> bool:
    return path.suffix.lower() in ARRAY_EXTENSIONS


def _check_regular(path: Path) -> None:
    # before opening: to open a named pipe is to wait for its writer
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size == 0:
        raise ValueError("the file is empty")


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels are more than max_pixels={max_pixels}: "
            "raise max_pixels, or leave the file out"
        )


def _open_image(stream: IO[bytes], path: Path) -> ImageFile.ImageFile:
    """Read the header; as `Image.open`, but with no limit of pixels, which is global there."""
    Image.init()  # fills Image.OPEN, once
    prefix = stream.read(16)
    for name in FORMATS:
        reader, accepts = Image.OPEN[name]
        if accepts is None or accepts(prefix) is True:
            stream.seek(0)
            return reader(stream, os.fspath(path))
    raise ValueError(f"not an image: the bytes are none of {', '.join(FORMATS)}")


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation, 1 to 8, that is yet to be applied; before `load`."""
    if image.format == "TIFF":  # its reader applies the orientation, to `size` as well
        return 1
    try:
        # not image.getexif(): to look for a late EXIF block, PNG's decodes all pixels
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # a picture with damaged EXIF is still a picture
        return 1
    return orientation if orientation in TRANSPOSE_BY_ORIENTATION else 1
