"""The types of image files: their extensions, and the readers of Pillow and its plugins.

A type is detected by the content of a file, because wrong extensions are common. Of Pillow's
readers only those named here are used: the EPS reader, for example, runs Ghostscript.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO, NamedTuple

from PIL import Image, ImageFile, features

from kl_vae.runtime.files import display_name

INSTALL = "pip install 'kl-vae[formats]'"
ARRAY_EXTENSIONS = (".npy",)
BANDS_EXTENSIONS = (".tif", ".tiff")  # of image files with any number of bands

# as MAX_PIXELS of decoding
_MAX_PIXELS = 178_956_970

_Reader = Callable[[BinaryIO, str], ImageFile.ImageFile]


class _Optional(NamedTuple):
    """A type that not every installation of Pillow reads.

    Attributes:
        title: its usual name.
        reader: its name in Pillow.
        extensions: of its files, in lower case.
        available: whether Pillow or an installed plugin reads it.
    """

    title: str
    reader: str
    extensions: tuple[str, ...]
    available: bool


def _load_plugin(name: str) -> bool:
    """Import a plugin of Pillow; return whether it is installed."""
    if importlib.util.find_spec(name) is None:
        return False
    module = importlib.import_module(name)
    if name == "pillow_heif":
        module.register_heif_opener()
    return True


_AVIF = _Optional(
    "AVIF",
    "AVIF",
    (".avif", ".avifs"),
    importlib.util.find_spec("PIL._avif") is not None or _load_plugin("pillow_avif"),
)
_HEIC = _Optional(
    "HEIC",
    "HEIF",
    (".heic", ".heif", ".hif", ".heics", ".heifs"),
    _load_plugin("pillow_heif"),
)
_JPEG_XL = _Optional("JPEG XL", "JXL", (".jxl",), _load_plugin("pillow_jxl"))
_JPEG_2000 = _Optional(
    "JPEG 2000",
    "JPEG2000",
    (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    features.check("jpg_2000") is True,
)
_OPTIONAL = (_JPEG_2000, _AVIF, _HEIC, _JPEG_XL)

# extensions of the files that are read
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".jfif", ".jpe", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".apng", ".gif"),
    *(extension for kind in _OPTIONAL if kind.available for extension in kind.extensions),
)
# extensions of images that are never read, to report such files
_OTHER_EXTENSIONS = (
    *(".arw", ".cr2", ".cr3", ".dds", ".dib", ".dng", ".emf", ".eps", ".exr", ".hdr", ".icns"),
    *(".ico", ".nef", ".orf", ".pbm", ".pcx", ".pfm", ".pgm", ".pnm", ".ppm", ".psd", ".qoi"),
    *(".raf", ".ras", ".rw2", ".sgi", ".svg", ".tga", ".wmf", ".xbm", ".xcf", ".xpm", ".dcm"),
)
# every image or array, whether read or not
KNOWN_EXTENSIONS = frozenset(
    (
        *IMAGE_EXTENSIONS,
        *ARRAY_EXTENSIONS,
        *_OTHER_EXTENSIONS,
        *(extension for kind in _OPTIONAL for extension in kind.extensions),
    )
)


def skipped_message(counts: Mapping[str, int]) -> str:
    """Return how many files are skipped, by extension, and how to read them.

    Args:
        counts: number of files by extension.
    """
    listed = ", ".join(
        f"{number} {display_name(extension)}" for extension, number in Counter(counts).most_common()
    )
    total = sum(counts.values())
    files = "1 file" if total == 1 else f"{total} files"
    return "; ".join([f"{files} skipped: {listed}", *how_to_read(counts)])


def how_to_read(extensions: Iterable[str]) -> list[str]:
    """Return what to do to read files with these extensions, which are not read now."""
    found = set(extensions)
    missing = {
        extension for kind in _OPTIONAL if not kind.available for extension in kind.extensions
    }
    fixes = []
    if found & set(IMAGE_EXTENSIONS):
        fixes.append("only .tif and .npy have other numbers of channels than 1, 3 and 4")
    if found & missing:
        fixes.append(INSTALL)
    if found & set(ARRAY_EXTENSIONS):
        fixes.append("read arrays with data.train.include='[\"*.npy\"]' (--include '*.npy')")
    if found & set(_OTHER_EXTENSIONS):
        fixes.append("convert the others to PNG" if fixes else "convert them to PNG")
    return fixes


# --- readers


def _open(kind: _Optional, stream: BinaryIO) -> ImageFile.ImageFile:
    """Open a file of an optional type.

    Raises:
        ValueError: nothing that reads this type is installed.
    """
    if not kind.available:
        raise ValueError(f"a {kind.title} file: {INSTALL} to read it, or convert it to PNG")
    return Image.OPEN[kind.reader][0](stream, "")


def _open_avif_or_heic(stream: BinaryIO, _name: str) -> ImageFile.ImageFile:
    """Open a file in the ISO base media format, whose first box lists the formats it conforms to.

    The first brand may be `mif1`, which both formats have.
    """
    length = int.from_bytes(stream.read(4), "big")
    box = stream.read(max(0, min(length, 256) - 4))  # ftyp, brand, version, brands
    stream.seek(0)
    brands = {box[start : start + 4] for start in (4, *range(12, len(box), 4))}
    return _open(_AVIF if brands & {b"avif", b"avis"} else _HEIC, stream)


def _open_jpeg_xl(stream: BinaryIO, _name: str) -> ImageFile.ImageFile:
    """Open a JPEG XL file; the plugin then decodes all pixels, so their number is checked first."""
    if _JPEG_XL.available:
        height, width = _jpeg_xl_size(stream)
        if height * width > _MAX_PIXELS:
            raise ValueError(
                f"{width} x {height} pixels are more than {_MAX_PIXELS}, the most of a JPEG XL "
                "file: make the image smaller, save it as PNG, or exclude the file"
            )
        stream.seek(0)
    image = _open(_JPEG_XL, stream)
    if not image.jpeg:  # type: ignore[attr-defined]
        image.info.pop("exif", None)  # the decoder has applied the orientation
    return image


def _jpeg_xl_size(stream: BinaryIO) -> tuple[int, int]:
    """Return (height, width) from the size header of a JPEG XL file (ISO/IEC 18181-1, D.2).

    Raises:
        ValueError: The file has no such header.
    """
    start = stream.read(2)
    stream.seek(0)
    while start != b"\xff\x0a":  # in a box of the container
        length, kind = int.from_bytes(stream.read(4), "big"), stream.read(4)
        if length == 1:
            length = int.from_bytes(stream.read(8), "big") - 8
        if kind in (b"jxlc", b"jxlp"):
            stream.seek(4 if kind == b"jxlp" else 0, os.SEEK_CUR)  # the index of the part
            break
        if length < 8:
            raise ValueError("a JPEG XL file without an image: it is damaged")
        stream.seek(length - 8, os.SEEK_CUR)
    stream.seek(2, os.SEEK_CUR)
    bits = int.from_bytes(stream.read(10), "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height, ratio = side(), take(3)
    if ratio == 0:
        return height, side()
    numerator, denominator = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height, height * numerator // denominator


def _is_avif_or_heic(prefix: bytes) -> bool:
    brands = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc")
    return prefix[4:8] == b"ftyp" and prefix[8:12] in (*brands, b"hevx", b"hevm", b"hevs")


def _is_jpeg_xl(prefix: bytes) -> bool:
    return prefix.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"))


def _is_jpeg_2000(prefix: bytes) -> bool:
    return prefix.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"))


# In Pillow's table of readers, but not in its list of formats: `Image.open` does not see them.
_READERS: dict[str, tuple[_Reader, Callable[[bytes], bool]]] = {
    "JPEG 2000": (lambda stream, _: _open(_JPEG_2000, stream), _is_jpeg_2000),
    "JPEG XL": (_open_jpeg_xl, _is_jpeg_xl),
    "AVIF or HEIC": (_open_avif_or_heic, _is_avif_or_heic),
}
Image.OPEN.update(_READERS)  # type: ignore[arg-type]

# names in Pillow's table of readers, in the order in which they are tried
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", *_READERS)
