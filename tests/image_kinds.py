"""Image files of every kind that is read, and the values that come out; see `docs/images.md`.

`python -m tests.image_kinds` writes the table of that page.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SIZE = 48  # pixels; three columns of 16: black, middle, white
PAGE = Path(__file__).parents[1] / "docs" / "images.md"
START, END = "<!-- table -->\n", "<!-- end of the table -->\n"


@dataclass(frozen=True)
class Kind:
    """A kind of file: how it is written and read, and the values of its columns.

    Attributes:
        name: file type, depth, polarity, bands and profile, as in the table.
        suffix: of the file.
        write: writes the file.
        stored: values of the three columns as stored; the first band of several.
        read: values of the three columns in the first channel, 0 to 255.
        channels: C.
        settings: of `data` in a config.
    """

    name: str
    suffix: str
    write: Callable[[Path], object]
    stored: tuple[float, ...]
    read: tuple[int, ...]
    channels: int = 1
    settings: tuple[tuple[str, Any], ...] = ()


def columns(stored: tuple[float, ...], dtype: Any, bands: int | None = None) -> np.ndarray:
    """Return [SIZE,SIZE] or [SIZE,SIZE,bands]; band k has the columns rotated by k."""
    row = np.repeat(np.array(stored, dtype), SIZE // len(stored))
    grey = np.tile(row, (SIZE, 1))
    if bands is None:
        return grey
    step = SIZE // len(stored)
    return np.stack([np.roll(grey, k * step, axis=1) for k in range(bands)], axis=2)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(path: Path, array: np.ndarray, extra: bytes = b"") -> None:
    """Write a PNG of 8 or 16 bits; `extra` holds further chunks."""
    bands = 1 if array.ndim == 2 else array.shape[2]
    color = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    bits = 8 * array.dtype.itemsize
    rows = b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, color, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", head)
        + extra
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def tiff(path: Path, array: np.ndarray, **how: Any) -> None:
    import tifffile

    tifffile.imwrite(path, array, **how)


def packed_tiff(path: Path, values: np.ndarray, bits: int, photometric: int) -> None:
    """Write greys of 10 to 14 packed bits, which tifffile writes only with imagecodecs."""
    stored = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(*values.shape, 2), axis=-1)
    data = np.packbits(stored[..., 16 - bits :].reshape(len(values), -1), axis=-1).tobytes()
    size = values.shape[0]
    tags = [(256, size), (257, size), (258, bits), (259, 1), (262, photometric), (273, 0)]
    tags += [(277, 1), (278, size), (279, len(data))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(head + data)


def with_profile(path: Path, stored: tuple[int, ...], gamma: float) -> None:
    """Write a JPEG of grey RGB with the profile of sRGB's primaries and another gamma."""
    Image.fromarray(columns(stored, np.uint8, 1).repeat(3, axis=2)).save(
        path, quality=100, subsampling=0, icc_profile=gamma_profile(gamma)
    )


def gamma_profile(gamma: float) -> bytes:
    """Return an ICC profile of sRGB's primaries with a pure power as its curve."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    count = struct.unpack(">I", srgb[128:132])[0]
    content = bytearray(srgb)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    content += curve
    for i in range(count):
        at = 132 + 12 * i
        if srgb[at : at + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            content[at + 4 : at + 12] = struct.pack(">II", len(srgb), len(curve))
    content[0:4] = struct.pack(">I", len(content))
    return bytes(content)


def by_pillow(stored: tuple[int, ...], mode: str, **options: Any) -> Callable[[Path], object]:
    return lambda path: (
        Image.fromarray(columns(stored, np.uint8)).convert(mode).save(path, **options)
    )


FULL8, FULL12, FULL16 = (0, 51, 255), (0, 819, 4095), (0, 13107, 65535)
UNIT, READ = (0.0, 0.2, 1.0), (0, 51, 255)
SBIT = png_chunk(b"sBIT", bytes([12]))
IR = {"photometric": "rgb", "extrasamples": ["unspecified"]}
BANDS = {"photometric": "minisblack", "planarconfig": "contig"}
PLANES = {"photometric": "minisblack", "planarconfig": "separate"}


def kinds() -> list[Kind]:
    """Return all kinds of the table."""
    u1, u2 = np.uint8, np.uint16
    return [
        Kind("PNG, 1 bit", ".png", by_pillow((0, 255, 255), "1"), (0, 1, 1), (0, 255, 255)),
        Kind("PNG, 8 bits", ".png", by_pillow(FULL8, "L"), FULL8, READ),
        Kind("PNG, 8 bits, palette", ".png", by_pillow(FULL8, "P"), FULL8, READ, 3),
        Kind("PNG, 8 bits, RGB", ".png", by_pillow(FULL8, "RGB"), FULL8, READ, 3),
        Kind("PNG, 8 bits, RGB, read as grey", ".png", by_pillow(FULL8, "RGB"), FULL8, READ),
        Kind("PNG, 8 bits, RGBA", ".png", by_pillow(FULL8, "RGBA"), FULL8, READ, 4),
        Kind("PNG, 16 bits", ".png", lambda p: png(p, columns(FULL16, u2)), FULL16, READ),
        Kind(
            "PNG, 16 bits, RGB", ".png", lambda p: png(p, columns(FULL16, u2, 3)), FULL16, READ, 3
        ),
        Kind(
            "PNG, 12 bits stored in 16",
            ".png",
            lambda p: png(p, columns(FULL12, u2)),
            FULL12,
            READ,
        ),
        Kind(
            "PNG, 12 bits stored in 16, RGB",
            ".png",
            lambda p: png(p, columns(FULL12, u2, 3)),
            FULL12,
            READ,
            3,
        ),
        Kind(
            "PNG, 16 bits, sBIT 12, scaled",
            ".png",
            lambda p: png(p, columns((0, 819 * 16 + 3, 65535), u2), SBIT),
            (0, 819 * 16 + 3, 65535),
            READ,
        ),
        Kind(
            "PNG, 16 bits, sBIT 12, not scaled",
            ".png",
            lambda p: png(p, columns(FULL12, u2), SBIT),
            FULL12,
            READ,
        ),
        Kind(
            "PNG, 16 bits, range [819, 4095]",
            ".png",
            lambda p: png(p, columns((0, 819, 4095), u2)),
            (0, 819, 4095),
            (0, 0, 255),
            1,
            (("range", [819, 4095]),),
        ),
        Kind("WebP, 8 bits, RGB", ".webp", by_pillow(FULL8, "RGB", lossless=True), FULL8, READ, 3),
        Kind("BMP, 8 bits, RGB", ".bmp", by_pillow(FULL8, "RGB"), FULL8, READ, 3),
        Kind("JPEG, 8 bits, RGB", ".jpg", by_pillow(FULL8, "RGB", quality=100), FULL8, READ, 3),
        Kind(
            "JPEG, 8 bits, RGB, profile of gamma 1",
            ".jpg",
            lambda p: with_profile(p, (0, 51, 255), 1.0),
            FULL8,
            (0, 124, 255),  # 0.2 by the sRGB curve
            3,
        ),
        Kind(
            "JPEG, 8 bits, RGB, damaged profile",
            ".jpg",
            by_pillow(FULL8, "RGB", quality=100, icc_profile=b"damaged"),
            FULL8,
            READ,
            3,
        ),
        Kind(
            "JPEG, 8 bits, CMYK",
            ".jpg",
            by_pillow((0, 51, 255), "CMYK", quality=100),
            FULL8,
            READ,
            3,
        ),
        Kind("TIFF, 8 bits", ".tif", lambda p: tiff(p, columns(FULL8, u1)), FULL8, READ),
        Kind(
            "TIFF, 8 bits, min-is-white",
            ".tif",
            lambda p: tiff(p, columns(FULL8, u1), photometric="miniswhite"),
            FULL8,
            (255, 204, 0),
        ),
        Kind(
            "TIFF, 12 bits",
            ".tif",
            lambda p: packed_tiff(p, columns(FULL12, u2), 12, 1),
            FULL12,
            READ,
        ),
        Kind(
            "TIFF, 12 bits, min-is-white",
            ".tif",
            lambda p: packed_tiff(p, columns(FULL12, u2), 12, 0),
            FULL12,
            (255, 204, 0),
        ),
        Kind("TIFF, 16 bits", ".tif", lambda p: tiff(p, columns(FULL16, u2)), FULL16, READ),
        Kind(
            "TIFF, 16 bits, min-is-white",
            ".tif",
            lambda p: tiff(p, columns(FULL16, u2), photometric="miniswhite"),
            FULL16,
            (255, 204, 0),
        ),
        Kind(
            "TIFF, 12 bits stored in 16",
            ".tif",
            lambda p: tiff(p, columns(FULL12, u2)),
            FULL12,
            READ,
        ),
        Kind(
            "TIFF, 12 bits stored in 16, min-is-white",
            ".tif",
            lambda p: tiff(p, columns(FULL12, u2), photometric="miniswhite"),
            FULL12,
            (255, 204, 0),
        ),
        Kind(
            "TIFF, signed 16 bits, range [-1000, 4000]",
            ".tif",
            lambda p: tiff(p, columns((-1000, 0, 4000), np.int16)),
            (-1000, 0, 4000),
            READ,
            1,
            (("range", [-1000, 4000]),),
        ),
        Kind("TIFF, float32", ".tif", lambda p: tiff(p, columns(UNIT, np.float32)), UNIT, READ),
        Kind("TIFF, float64", ".tif", lambda p: tiff(p, columns(UNIT, np.float64)), UNIT, READ),
        Kind("TIFF, float16", ".tif", lambda p: tiff(p, columns(UNIT, np.float16)), UNIT, READ),
        Kind(
            "TIFF, float32 in [-1, 1]",
            ".tif",
            lambda p: tiff(p, columns((-1, -0.6, 1), np.float32)),
            (-1, -0.6, 1),
            READ,
        ),
        Kind(
            "TIFF, float32, range [0, 250]",
            ".tif",
            lambda p: tiff(p, columns((0, 50, 250), np.float32)),
            (0, 50, 250),
            READ,
            1,
            (("range", [0, 250]),),
        ),
        Kind(
            "TIFF, 16 bits, RGB",
            ".tif",
            lambda p: tiff(p, columns(FULL16, u2, 3), photometric="rgb"),
            FULL16,
            READ,
            3,
        ),
        Kind(
            "TIFF, float32, RGB",
            ".tif",
            lambda p: tiff(p, columns(UNIT, np.float32, 3), photometric="rgb"),
            UNIT,
            READ,
            3,
        ),
        Kind(
            "TIFF, 8 bits, RGB + infrared",
            ".tif",
            lambda p: tiff(p, columns(FULL8, u1, 4), **IR),
            FULL8,
            READ,
            4,
        ),
        Kind(
            "TIFF, 16 bits, RGB + infrared",
            ".tif",
            lambda p: tiff(p, columns(FULL16, u2, 4), **IR),
            FULL16,
            READ,
            4,
        ),
        Kind(
            "TIFF, 16 bits, 5 bands",
            ".tif",
            lambda p: tiff(p, columns(FULL16, u2, 5), **BANDS),
            FULL16,
            READ,
            5,
        ),
        Kind(
            "TIFF, 16 bits, 12 bands, planar",
            ".tif",
            lambda p: tiff(p, columns(FULL16, u2, 12).transpose(2, 0, 1), **PLANES),
            FULL16,
            READ,
            12,
        ),
        Kind(
            "TIFF, 8 bits, 5 pages",
            ".tif",
            lambda p: tiff(p, columns(FULL8, u1, 5).transpose(2, 0, 1), photometric="minisblack"),
            FULL8,
            READ,
            5,
        ),
        Kind(
            "TIFF, 8 bits, 3 pages, pages: channels",
            ".tif",
            lambda p: tiff(p, columns(FULL8, u1, 3).transpose(2, 0, 1), photometric="minisblack"),
            FULL8,
            READ,
            3,
            (("pages", "channels"),),
        ),
        Kind(
            "TIFF, 8 bits, 3 pages, pages: first",
            ".tif",
            lambda p: tiff(p, columns(FULL8, u1, 3).transpose(2, 0, 1), photometric="minisblack"),
            FULL8,
            READ,
            1,
            (("pages", "first"),),
        ),
        Kind(".npy, uint8", ".npy", lambda p: np.save(p, columns(FULL8, u1)), FULL8, READ),
        Kind(".npy, uint16", ".npy", lambda p: np.save(p, columns(FULL16, u2)), FULL16, READ),
        Kind(
            ".npy, 12 bits stored in uint16",
            ".npy",
            lambda p: np.save(p, columns(FULL12, u2)),
            FULL12,
            READ,
        ),
        Kind(".npy, float32", ".npy", lambda p: np.save(p, columns(UNIT, np.float32)), UNIT, READ),
        Kind(
            ".npy, float32 in [-1, 1]",
            ".npy",
            lambda p: np.save(p, columns((-1, -0.6, 1), np.float32)),
            (-1, -0.6, 1),
            READ,
        ),
        Kind(
            ".npy, float32, [C, H, W]",
            ".npy",
            lambda p: np.save(p, columns(UNIT, np.float32, 5).transpose(2, 0, 1)),
            UNIT,
            READ,
            5,
        ),
    ]


def table() -> str:
    """Return the table of `docs/images.md`."""
    rows = ["| file | channels | stored | read |", "|---|---|---|---|"]
    for kind in kinds():
        stored = ", ".join(f"{value:g}" for value in kind.stored)
        read = ", ".join(str(value) for value in kind.read)
        rows.append(f"| {kind.name} | {kind.channels} | {stored} | {read} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
