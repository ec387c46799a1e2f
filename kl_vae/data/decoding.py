"""Decoding of image files and `.npy` files: open, check the size, decode, convert to a tensor.

`read_image_from` reads a stream, `read_image` a file, and `inspect_from` what a file states about
its numbers. `kl_vae.data.pixels` converts the decoded pixels to tensors.

Shapes: C channels, H height, W width.
"""

import errno
import logging
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, GifImagePlugin, Image, ImageFile, JpegImagePlugin, TiffImagePlugin
from torch import Tensor

from kl_vae.data.file_types import ARRAY_EXTENSIONS, FORMATS
from kl_vae.data.pixel_format import (
    HOW_TO_SET_PAGES,
    Inspected,
    Measured,
    PixelFormat,
    extremes,
    kind_of,
)
from kl_vae.data.pixels import (
    WHOLE_IMAGE,
    Stored,
    Wanted,
    array_to_tensor,
    pil_to_tensor,
    stored_to_tensor,
)
from kl_vae.data.png import PngReader, read_16_bits, stated_bits
from kl_vae.data.tiff import TiffReader, oriented, page_numbers, read_bands, tags_of
from kl_vae.runtime.errors import StorageError
from kl_vae.runtime.files import display_name

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Stream = TypeVar("Stream", bound=BinaryIO)

# same limit as Pillow's: 512 MiB as RGB
MAX_PIXELS = 178_956_970
# of a JPEG, each decoded over all pixels; progressive files have 5 to 18, and 100 empty ones of
# `MAX_PIXELS` take 9 s
MAX_SCANS = 100

TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# seconds before each further attempt to read from a storage that failed
RETRY_SECONDS = (1.0, 2.0, 4.0)
# errors of a device, a network file system or this process, which say nothing about the file
_NOT_OF_THE_FILE = {
    getattr(errno, name)
    for name in (
        *("EIO", "ENXIO", "ENODEV", "ESTALE", "EREMOTEIO", "ENOLINK", "ENOTCONN", "ETIMEDOUT"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH"),
        *("ENETDOWN", "ENETUNREACH", "EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
}

_MAX_REASON = 500  # characters of an error message

PIXEL_FORMAT = PixelFormat()  # no ranges but those that files state, and no file of several pages


class ImageError(ValueError):
    """Error for a file that cannot be used as an image; the message is one line, `PATH: reason`."""


# --- files and streams


def read_image(
    path: str | os.PathLike[str],
    channels: int,
    max_pixels: int = MAX_PIXELS,
    wanted: Wanted = WHOLE_IMAGE,
    pixel_format: PixelFormat = PIXEL_FORMAT,
) -> Tensor:
    """Decode a file to [C,H,W].

    An image file is decoded to uint8, rounded if it has more bits. Its EXIF orientation is
    applied, its colours are converted to sRGB by its ICC profile, and transparency is composited on
    white unless C is 4. TIFF files may have any number of bands, which is then C. Of an animation
    the first frame is read. The memory layout is channels-last.

    A `.npy` file contains [H,W,C] or [C,H,W], or [H,W] if C is 1. uint8 is returned as stored;
    other numbers are converted to float32 in [0, 1].

    Black and white are the lowest and the highest value of the depth that the file states (0 and 1
    for floats), unless `pixel_format` states others.

    Peak memory is at most 100 MB plus, for an image file, 24 bytes per pixel of `max_pixels` and
    50 bytes per byte of the file; for a `.npy` file, its size and 4 bytes per value.

    Args:
        path: the file.
        channels: C.
        max_pixels: maximum number of pixels, checked before decoding.
        wanted: the region to convert, and the minimum size to decode a JPEG at.
        pixel_format: values of black and white, and what the pages of a TIFF file are.

    Raises:
        ImageError: The file cannot be read, is damaged, has more than `max_pixels` pixels, bands
            that are not `channels`, or values outside its range.
    """
    opened = partial(open_file, Path(path))
    return read_image_from(opened, display_name(path), channels, max_pixels, wanted, pixel_format)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (height, width) of the image that `read_image` returns, from the file's header.

    Raises:
        ImageError: The file cannot be read or is not in a format that `read_image` supports.
    """
    return read_size_from(partial(open_file, Path(path)), display_name(path))


def read_image_from(
    open_stream: Callable[[], BinaryIO],
    name: str,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    wanted: Wanted = WHOLE_IMAGE,
    pixel_format: PixelFormat = PIXEL_FORMAT,
) -> Tensor:
    """Decode a stream to [C,H,W], in the same way as `read_image` decodes a file.

    Args:
        open_stream: opens a seekable stream; its errors are raised as ImageError.
        name: of the image in error messages; if it ends in `.npy`, the stream contains an array.
        channels: C.
        max_pixels: maximum number of pixels, checked before decoding.
        wanted: as in `read_image`.
        pixel_format: as in `read_image`.

    Raises:
        ImageError: as in `read_image`.
    """

    def read(stream: BinaryIO) -> Tensor:
        if _is_array(name):
            array = _read_array(stream, max_pixels)
            return wanted.cut(array_to_tensor(array, channels, pixel_format))
        image = _open_image(stream)
        _check_size(image, stream, max_pixels)
        if wanted.short_side is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            _draft(image, wanted.short_side)
        decoded = _decode(image, stream, channels, max_pixels, pixel_format)
        if isinstance(decoded, Stored):
            return stored_to_tensor(decoded, channels, wanted, pixel_format, name)
        return pil_to_tensor(decoded, channels, wanted, pixel_format, name)

    return _read_stream(open_stream, name, read)


def tiff_pages(path: str | os.PathLike[str]) -> list[int]:
    """Return the numbers of the pages of a TIFF file that are images; [0] for other files."""

    def pages(stream: BinaryIO) -> list[int]:
        image = _open_image(stream)
        return page_numbers(image) if isinstance(image, TiffReader) else [0]

    try:
        return _read_stream(partial(open_file, Path(path)), display_name(path), pages)
    except ImageError:  # reported when the file is read
        return [0]


def inspect_from(
    open_stream: Callable[[], BinaryIO], name: str, max_pixels: int = MAX_PIXELS
) -> Inspected:
    """Return what a file states about its numbers; files of 8 bits are not decoded.

    Raises:
        ImageError: as in `read_image`.
    """

    def inspect(stream: BinaryIO) -> Inspected:
        if _is_array(name):
            array = _read_array(stream, max_pixels)
            return Inspected(None if array.dtype == np.uint8 else _measured(array))
        image = _open_image(stream)
        _check_size(image, stream, max_pixels)
        if isinstance(image, TiffReader):
            pages = len(page_numbers(image))
            tags = tags_of(image)
            measured = None
            if tags.bits > 8 or tags.kind != "u":
                stored = _read_page(image, stream, 0, max_pixels)
                if isinstance(stored, Stored) and stored.bits is None:
                    measured = _measured(stored.values)
            return Inspected(measured, pages, tags.bands)
        if isinstance(image, PngReader):
            if image.chunks.depth != 16:
                return Inspected(animated=image.chunks.animated)
            stored = _read_16_bit_png(image)
            return Inspected(
                None if stored.bits else _measured(stored.values), animated=image.chunks.animated
            )
        animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
        if not image.mode.startswith(("I", "F")):
            return Inspected(animated=animated)
        image.load()
        return Inspected(_measured(Stored.of(image).values), animated=animated)

    return _read_stream(open_stream, name, inspect)


def _measured(values: NDArray[Any]) -> Measured:
    return Measured(kind_of(values.dtype), *extremes(values))


def read_size_from(open_stream: Callable[[], BinaryIO], name: str) -> tuple[int, int]:
    """Return (height, width) of the image in a stream; see `read_image_from` and `read_size`."""

    def read(stream: BinaryIO) -> tuple[int, int]:
        if _is_array(name):
            shape, _, _ = _read_array_header(stream)
            return shape[0], shape[1]
        image = _open_image(stream)
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)

    return _read_stream(open_stream, name, read)


def _read_stream(
    open_stream: Callable[[], BinaryIO], name: str, read: Callable[[BinaryIO], Result]
) -> Result:
    """Return `read(stream)`; if the storage fails, try again after some seconds.

    Raises:
        ImageError: The file cannot be used.
        StorageError: The storage still fails after the last wait.
    """
    for seconds in RETRY_SECONDS:
        try:
            with _image_errors(name), open_stream() as stream:
                _check_not_empty(stream)
                return read(stream)
        except StorageError as error:
            logger.warning("the storage failed: %s; trying again in %g s", error, seconds)
            time.sleep(seconds)
    with _image_errors(name), open_stream() as stream:
        _check_not_empty(stream)
        return read(stream)


def open_below(root: Path, open_stream: Callable[[], Stream]) -> Stream:
    """Return `open_stream()`; where its file is missing, check that the folder `root` is there.

    Raises:
        OSError: The file cannot be opened. With ESTALE: the folder is missing or empty, as the
            mount point of an unmounted file system is.
    """
    try:
        return open_stream()
    except FileNotFoundError:
        if not root.is_dir() or next(os.scandir(root), None) is None:
            text = f"the folder {display_name(root)} is missing or empty"
            raise OSError(errno.ESTALE, text) from None
        raise


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; ValueError: it is another kind of file."""
    # checked before opening, because opening a named pipe blocks until it has a writer
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    return path.open("rb")


@contextmanager
def _image_errors(name: str) -> Iterator[None]:
    """Convert every error to an `ImageError` or `StorageError` with the file name.

    Pillow's warnings are suppressed.
    """
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
        cause: BaseException | None = error  # readers wrap the errors of a stream
        while cause is not None and getattr(cause, "errno", None) not in _NOT_OF_THE_FILE:
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError):
            raise StorageError(f"{name}: {cause.strerror}") from error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # the reason may contain unprintable bytes of the file
        reason = display_name(" ".join(reason.split()))
        if len(reason) > _MAX_REASON:  # it may also contain a whole header
            reason = f"{reason[:_MAX_REASON]}..."
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
            own = {"TIFF": TiffReader, "GIF": _Gif, "PNG": PngReader}
            try:
                return own.get(name, reader)(stream, "")
            except (OSError, SyntaxError, ValueError, RuntimeError) as error:
                raise ValueError(f"{name}: cannot be read ({error})") from error
    raise ValueError(f"not an image: the bytes are none of {', '.join(FORMATS)}")


def _check_size(image: ImageFile.ImageFile, stream: BinaryIO, max_pixels: int) -> None:
    """Check what bounds the time and memory of decoding."""
    _check_pixels(image.height, image.width, max_pixels)
    if isinstance(image, TiffReader):
        _check_tiles(image, max_pixels)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        _check_scans(stream)


# a JPEG marker; in the data of a scan, 0xFF is followed by 0 or by a restart marker
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = b"\xd8", b"\xd9", b"\xda"


def _check_scans(stream: BinaryIO) -> None:
    """Check the number of scans of a JPEG; libjpeg decodes each over the whole image."""
    stream.seek(0)
    content = stream.read()
    at, scans = 0, 0
    while (marker := _MARKER.search(content, at)) and marker[1] != _END_OF_IMAGE:
        scans += marker[1] == _START_OF_SCAN
        at = marker.end()
        if marker[1] != _START_OF_IMAGE:  # of the others the length follows
            at += int.from_bytes(content[at : at + 2], "big")
    if scans > MAX_SCANS:
        raise ValueError(
            f"{scans} scans are more than {MAX_SCANS}, and take long to decode: save the image "
            "again, or exclude the file"
        )


def _decode(
    image: ImageFile.ImageFile,
    stream: BinaryIO,
    channels: int,
    max_pixels: int,
    pixel_format: PixelFormat,
) -> Image.Image | Stored:
    """Read the pixels of an open image, with the orientation applied."""
    if isinstance(image, TiffReader):
        return _read_tiff(image, stream, channels, max_pixels, pixel_format)
    if isinstance(image, PngReader) and image.chunks.depth == 16:
        return _read_16_bit_png(image)
    method = TRANSPOSE_BY_ORIENTATION.get(_orientation(image))
    image.load()
    return image if method is None else image.transpose(method)


def _read_16_bit_png(image: PngReader) -> Stored:
    values = read_16_bits(image.chunks)
    return Stored(
        oriented(values, _orientation(image)),
        {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[values.shape[2]],
        bits=stated_bits(values, image.chunks.significant),
        profile=image.chunks.profile,
        transparent=image.chunks.transparent,
    )


def _read_tiff(
    image: TiffReader,
    stream: BinaryIO,
    channels: int,
    max_pixels: int,
    pixel_format: PixelFormat,
) -> Image.Image | Stored:
    """Read the first page, or the pages as channels."""
    if pixel_format.page is not None:
        return _read_page(image, stream, pixel_format.page, max_pixels)
    pages = [0] if pixel_format.pages == "first" else page_numbers(image)
    if len(pages) == 1:
        return _read_page(image, stream, 0, max_pixels)
    found = Inspected(pages=len(pages), bands=tags_of(image).bands)
    if pixel_format.pages != "channels" and not found.are_channels(channels):
        raise ValueError(f"{len(pages)} pages: {HOW_TO_SET_PAGES}")
    stored = []
    left = max_bytes = _max_bytes(stream, max_pixels)
    for page in pages:
        read = _read_page(image, stream, page, max_pixels)
        # an image is valid until the next page is read
        stored.append(read if isinstance(read, Stored) else Stored.of(read))
        left -= stored[-1].values.nbytes
        if left < 0:
            raise ValueError(
                f"{len(pages)} pages take more than {max_bytes} bytes: increase max_pixels, or "
                "exclude the file"
            )
    shapes = {page.values.shape[:2] for page in stored}
    if len(shapes) > 1:
        raise ValueError(f"pages of sizes {sorted(shapes)} are not the channels of one image")
    values = np.concatenate([page.values for page in stored], axis=2)
    return stored[0]._replace(values=values, mode=None)


def _read_page(
    image: TiffReader, stream: BinaryIO, page: int, max_pixels: int
) -> Image.Image | Stored:
    """Read a page of a TIFF file: as an image, or its samples where they have more than 8 bits."""
    image.seek(page)
    _check_size(image, stream, max_pixels)
    tags = tags_of(image)
    stated = tags.bits if tags.kind == "u" and tags.bits not in (8, 16, 32, 64) else None
    if tags.needs_tifffile or image.unreadable:
        mode = tags.mode
        if mode is not None and tags.has_alpha:
            mode += "a" if tags.extra[0] == 1 else "A"
        return Stored(
            read_bands(stream, page, tags, image.orientation, _max_bytes(stream, max_pixels)),
            mode,
            bits=stated,
            inverted=image.min_is_white,
            profile=image.profile,
        )
    image.load()
    if tags.bits <= 8:
        return image
    return Stored.of(image)._replace(bits=stated, inverted=image.min_is_white)


def _max_bytes(stream: BinaryIO, max_pixels: int) -> int:
    """Return the memory that the samples of a file may take; see `read_image`."""
    return 24 * max_pixels + 50 * stream.seek(0, os.SEEK_END)


def _check_tiles(image: TiffReader, max_pixels: int) -> None:
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
