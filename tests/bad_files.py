"""A folder of files that no image can be read from, and of odd ones from which one can.

Most of the bad ones are valid files of every format that a seeded generator damaged until
`read_image` refused them. All are meant to be read with `MAX_PIXELS`, and arrays as well.
"""

import os
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from kl_vae.data import ImageError, read_image

MAX_PIXELS = 1_000_000
DRAWS = 40  # at most, for one damaged file


class BadFiles(NamedTuple):
    """Names relative to the folder."""

    bad: list[str]  # each is to be reported
    good: list[str]  # each is to be read: odd, but images


def write_bad_files(folder: Path, seed: int = 0) -> BadFiles:
    """Write the files, the same ones for the same seed, and say which are which.

    A file without permission is among them unless root writes, who may read it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bad = {**no_images(), **bombs(), **bad_arrays()}
    good = {**odd_images(), **large_metadata()}
    for name, content in {**bad, **good}.items():
        (folder / name).write_bytes(content)
    damaged = [
        name
        for i, (name, content) in enumerate(valid_images().items())
        for name in _write_damaged(folder, name, content, np.random.default_rng([seed, i]))
    ]
    return BadFiles([*bad, *damaged, *_write_no_files(folder)], [*good, *_write_links(folder)])


# --- bytes that are no image


def no_images() -> dict[str, bytes]:
    """Files of other kinds, of nothing, and of the first bytes of an image."""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", bytes(100))
    beginnings = {
        "png": b"\x89PNG\r\n\x1a\n",
        "jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
        "tif": b"II*\0",
        "big.tif": b"MM\0+\0\x08\0\0",
        "bmp": b"BM",
        "gif.png": b"GIF89a",
        "webp": b"RIFF\x20\0\0\0WEBPVP8 ",
        "npy": b"\x93NUMPY\1\0",
    }
    return {
        **{f"empty.{suffix}": b"" for suffix in ("png", "jpg", "webp", "bmp", "tiff", "npy")},
        **{f"beginning.{suffix}": content for suffix, content in beginnings.items()},
        "text.png": b"This is a text, and not even a long one.\n" * 9,
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "document.jpg": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "archive.png": archive.getvalue(),
        "zeros.jpg": bytes(1000),
        "link.lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "new\nline.png": b"nothing",
        "escape\x1b[31m.png": b"nothing",
        "-rf.png": b"nothing",
        os.fsdecode(b"not utf-8 \xff\xfe.png"): b"nothing",
        "b" * 251 + ".png": b"nothing",
    }


def bad_arrays() -> dict[str, bytes]:
    """Arrays that are no images, or ask for more memory than there is."""

    def npy(array: np.ndarray, **changed: Any) -> bytes:
        stream = BytesIO()
        header = np.lib.format.header_data_from_array_1_0(array) | changed
        np.lib.format.write_array_header_1_0(stream, header)
        return stream.getvalue() + array.tobytes()

    pixels = np.zeros((4, 4, 3), np.uint8)
    return {
        "flat.npy": npy(np.zeros(9, np.uint8)),
        "two_channels.npy": npy(pixels[..., :2]),
        "booleans.npy": npy(pixels > 0),
        "nan.npy": npy(np.full((4, 4, 3), np.nan)),
        "huge.npy": npy(pixels, shape=(10**9, 10**9, 3)),
        "negative.npy": npy(pixels, shape=(-4, 4, 3)),
        "no_pixels.npy": npy(pixels[:0]),
        "wide_items.npy": npy(pixels, descr="|V1000000000", shape=(4, 4, 3)),
        "objects.npy": npy(pixels, descr="|O"),
    }


# --- more memory than the file's size lets one expect


def large_metadata() -> dict[str, bytes]:
    """Small images with metadata of 1 GB, which is not needed to read them."""
    return {
        "text_of_1_GB.png": png(1, 1, zeros(2), b"zTXta\0\0" + zeros(2**30)),
        "profile_of_1_GB.png": png(1, 1, zeros(2), b"iCCPa\0\0" + zeros(2**30)),
    }


def bombs() -> dict[str, bytes]:
    """Small files of many pixels, or with something else that takes memory."""
    return {
        "zeros.png": png(60_000, 60_000, zeros(60_000 * 7501), bits=1),
        "no_width.png": png(0, 4, zeros(4)),
        "pixels.jpg": _resized_jpeg(65_500, 65_500),
        "no_height.jpg": _resized_jpeg(9, 0),
        "scans.jpg": jpeg_of_scans(101),
        "canvas.gif.png": gif((65_535, 65_535), (9, 9)),
        "frame.gif.png": gif((9, 9), (65_535, 65_535)),
        "disposal.gif.png": gif((13_000, 13_000), (13_000, 13_000)),
        "no_pixels.gif.png": gif((0, 0), (0, 0)),
        "canvas.webp": webp(16_384, 16_384),
        "large_canvas.webp": webp(13_000, 13_000),
        "pixels.bmp": bmp(2**31 - 1, 2**31 - 1, b""),
        "no_pixels.bmp": bmp(0, 0, b""),
        "row.rle.bmp": bmp(100_000_000, 1, b"\0\2\xff\xff" * 9),
        "pixels.tif": tiff({256: 2**31, 257: 2**31, 273: [200], 278: 1}),
        "no_pixels.tif": tiff({256: 0, 257: 0, 273: [200], 278: 1}),
        # 16384 x 16384 pixels of which the image is 8 x 8
        "tile.tif": tiff({322: 2**14, 323: 2**14, 324: [200]}, compression=8, data=zeros(2**28)),
        "damaged_tile.tif": tiff({322: 2**14, 323: 2**14, 324: [200]}, compression=5),
        "tile_of_no_size.tif": tiff({322: 16, 323: 16, 324: [200]}, compression=5).replace(
            struct.pack("<HH", 322, 4),
            struct.pack("<HH", 322, 1),  # bytes, not a number
        ),
        "strips.tif": tiff({273: [200] * 300_000, 278: 1}),
    }


def jpeg_of_scans(scans: int, thumbnail: bytes = b"") -> bytes:
    """A progressive JPEG of so many scans: the last is repeated; with a JPEG in its metadata."""
    stream = BytesIO()
    Image.new("L", (40, 30), 99).save(stream, "JPEG", progressive=True, exif=thumbnail)
    content = stream.getvalue()
    written = content.count(b"\xff\xda", content.rindex(b"\xff\xc2"))
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * (scans - written) + content[-2:]


def zeros(number: int) -> bytes:
    """`number` zero bytes as zlib compresses them, made of one piece many times over."""
    piece = 2**20
    head = zlib.compressobj(9).compress(b"") or b"\x78\xda"
    compressor = zlib.compressobj(9, wbits=-15)
    whole = compressor.compress(bytes(piece)) + compressor.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, wbits=-15)
    end = rest.compress(bytes(number % piece)) + rest.flush()
    adler = number % 65521 << 16 | 1  # of zeros
    return head + whole * (number // piece) + end + struct.pack(">I", adler)


def png(
    width: int, height: int, pixels: bytes, extra: bytes = b"", bits: int = 8, color: int = 0
) -> bytes:
    """A PNG of compressed pixels, grey unless `color` says so; `extra`: one more chunk."""

    def chunk(content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
        )

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [header, *([extra] if extra else []), b"IDAT" + pixels, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, chunks))


def gif(canvas: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """A GIF whose first frame is to be replaced by a colour, with too few pixels in it."""
    return (
        b"GIF89a" + struct.pack("<HH", *canvas) + b"\xf0\0\0\0\0\0\xff\0\0"  # a palette of two
        b"!\xf9\4\x09\0\0\1\0,\0\0\0\0" + struct.pack("<HH", *frame) + b"\0\2\2\x44\1\0;"
    )


def webp(width: int, height: int) -> bytes:
    """An animated WebP of a large canvas, with one frame of 16 x 16."""
    pixels = _saved(Image.new("RGBA", (16, 16)), "WEBP", lossless=True)[12:]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content

    def of_3_bytes(*numbers: int) -> bytes:
        return b"".join(struct.pack("<I", number)[:3] for number in numbers)

    chunks = (
        chunk(b"VP8X", b"\x12\0\0\0" + of_3_bytes(width - 1, height - 1))
        + chunk(b"ANIM", bytes(6))
        + chunk(b"ANMF", of_3_bytes(0, 0, 15, 15, 100) + b"\0" + pixels)
    )
    return chunk(b"RIFF", b"WEBP" + chunks)


def bmp(width: int, height: int, pixels: bytes) -> bytes:
    """A BMP of run lengths and 256 greens."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    palette = b"".join(bytes([0, i, 0, 0]) for i in range(256))
    size = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", size, 0, 0, size) + header + palette + pixels


def tiff(changed: dict[int, Any], compression: int = 1, data: bytes = bytes(768)) -> bytes:
    """An RGB TIFF of 8 x 8; its pixels are at byte 200 unless there are many tags."""
    tags = {256: 8, 257: 8, 258: [8, 8, 8], 259: compression, 262: 2, 277: 3, 284: 1}
    tags |= {279 if 273 in changed else 325: len(data)} | changed
    start = 8 + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, value in sorted(tags.items()):
        numbers = value if isinstance(value, list) else [value]
        content = struct.pack(f"<{len(numbers)}I", *numbers)
        entries += struct.pack("<HHI", tag, 4, len(numbers))
        entries += content if len(numbers) == 1 else struct.pack("<I", start + len(values))
        values += content if len(numbers) > 1 else b""
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + values
    return head.ljust(200, b"\0") + data


def _resized_jpeg(width: int, height: int) -> bytes:
    content = _saved(picture(), "JPEG")
    sizes = content.index(b"\xff\xc0") + 5
    return content[:sizes] + struct.pack(">HH", height, width) + content[sizes + 4 :]


# --- valid files, to be damaged


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A small image of noise, which compresses badly: damage is likely to hit it."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    if mode.startswith("I;16"):
        return Image.fromarray(noise[..., :2].copy().view("<u2")[..., 0])
    image = Image.fromarray(noise)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def valid_images() -> dict[str, bytes]:
    """One file of every format and of its kinds."""
    frames = {"save_all": True, "append_images": [picture().rotate(180)]}
    array = BytesIO()
    np.save(array, np.asarray(picture()))
    runs = b"".join(bytes([24, y, 0, 0]) for y in range(20)) + b"\0\1"
    return {
        "baseline.jpg": _saved(picture(), "JPEG"),
        "progressive.jpg": _saved(picture(), "JPEG", progressive=True),
        "rgb.png": _saved(picture(), "PNG"),
        "grey16.png": _saved(picture("I;16"), "PNG"),
        "palette.png": _saved(picture("P"), "PNG"),
        "interlaced.png": _interlaced(),
        "lossy.webp": _saved(picture(), "WEBP"),
        "lossless.webp": _saved(picture(), "WEBP", lossless=True),
        "animated.webp": _saved(picture(), "WEBP", **frames),
        "rgb.bmp": _saved(picture(), "BMP"),
        "runs.bmp": bmp(24, 20, runs),
        "raw.tif": _saved(picture(), "TIFF"),
        "lzw.tif": _saved(picture(), "TIFF", compression="tiff_lzw"),
        "deflate.tiff": _saved(picture(), "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": _saved(picture(), "TIFF", compression="jpeg"),
        "tiled.tif": tiff({322: 16, 323: 16, 324: [200]}, 8, zlib.compress(bytes(range(256)) * 3)),
        "gif.png": _saved(picture("P"), "GIF", **frames),
        "array.npy": array.getvalue(),
    }


def _interlaced() -> bytes:
    """An interlaced PNG, 8 x 8: seven passes of 1, 1, 1, 2, 2, 4 and 4 rows."""
    widths = [1] + [1] + [2] + [2] * 2 + [4] * 2 + [4] * 4 + [8] * 4
    rows = b"".join(b"\0" + bytes(range(width)) for width in widths)
    content = bytearray(png(8, 8, zlib.compress(rows)))
    content[28] = 1
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# --- damage


def _truncated(content: bytes, draw: Generator) -> bytes:
    return content[: draw.integers(1, len(content))]


def _flipped(content: bytes, draw: Generator) -> bytes:
    """Other bytes at four places, all in the header half of the time."""
    changed = bytearray(content)
    for place in draw.integers(0, draw.choice([min(100, len(content)), len(content)]), 4):
        changed[place] ^= draw.integers(1, 256)
    return bytes(changed)


def _zeroed(content: bytes, draw: Generator) -> bytes:
    start, end = sorted(draw.integers(0, len(content) + 1, 2))
    return content[:start] + bytes(end - start) + content[end:]


def _inserted(content: bytes, draw: Generator) -> bytes:
    place = draw.integers(0, len(content))
    return content[:place] + draw.bytes(draw.integers(1, 50)) + content[place:]


def _swapped(content: bytes, draw: Generator) -> bytes:
    a, b, c = sorted(draw.integers(0, len(content) + 1, 3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _of_other_sizes(content: bytes, draw: Generator) -> bytes:
    """An extreme number of 2 or 4 bytes in the header, where the sizes are."""
    number = draw.choice(
        [b"\0\0", b"\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff"]
    )
    place = draw.integers(4, min(200, len(content) - 4))
    return content[:place] + number + content[place + len(number) :]


DAMAGES: tuple[Callable[[bytes, Generator], bytes], ...] = (
    *[_truncated] * 3,
    *[_flipped] * 3,
    *[_zeroed] * 2,
    *[_inserted] * 2,
    *[_swapped] * 2,
    *[_of_other_sizes] * 2,
)


def _write_damaged(folder: Path, name: str, content: bytes, draw: Generator) -> Iterator[str]:
    """Write damaged files, of which no image can be read: what can be read is damaged again."""
    stem, _, suffix = name.rpartition(".")
    for i, damage in enumerate(DAMAGES):
        damaged = f"{stem}{damage.__name__}{i}.{suffix}"
        for _ in range(DRAWS):
            (folder / damaged).write_bytes(damage(content, draw))
            try:
                read_image(folder / damaged, 3, MAX_PIXELS)
            except ImageError:
                yield damaged
                break
        else:
            (folder / damaged).unlink()


# --- what is no file


def _write_no_files(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe.png")
    os.mknod(folder / "socket.jpg", stat.S_IFSOCK | 0o600)
    (folder / "gone.webp").symlink_to("nothing.webp")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "one.tif").symlink_to("other.tif")
    (folder / "other.tif").symlink_to("one.tif")
    (folder / "device.bmp").symlink_to(os.devnull)
    (folder / "folder.png").mkdir()  # these three are no files, and nothing is said of them
    (folder / "folder.png" / "up.png").symlink_to("..")
    (folder / "again.png").symlink_to(".")
    names = ["pipe.png", "socket.jpg", "gone.webp", "itself.png", "one.tif", "other.tif"]
    names.append("device.bmp")
    if os.geteuid() != 0:
        (folder / "secret.png").write_bytes(_saved(picture(), "PNG"))
        (folder / "secret.png").chmod(0)
        names.append("secret.png")
    return names


# --- odd, but images


def odd_images() -> dict[str, bytes]:
    """Images of unusual modes and in unusual files."""
    frames = {"save_all": True, "append_images": [picture().rotate(180)]}
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb = _saved(picture(), "PNG")
    array = BytesIO()
    np.save(array, np.asarray(picture(), np.uint16))
    images = {
        "cmyk.jpg": _saved(picture("CMYK"), "JPEG"),
        "turned.jpg": _saved(picture(), "JPEG", exif=turned),
        "transparent_palette.png": _saved(picture("P"), "PNG", transparency=bytes(range(256))),
        "deep.png": _saved(picture("I;16"), "PNG"),
        "deep.tif": _saved(picture("I;16"), "TIFF"),
        "floats.tif": _saved(Image.fromarray(np.asarray(picture("F")) / np.float32(255)), "TIFF"),
        "lab.tif": _saved(picture("LAB"), "TIFF"),
        "rgba.png": _saved(picture("RGBA"), "PNG"),
        "grey_and_alpha.png": _saved(picture("LA"), "PNG"),
        "bits.png": _saved(picture("1"), "PNG"),
        "animated.gif.png": _saved(picture("P"), "GIF", **frames),
        "animated.png": _saved(picture(), "PNG", **frames),
        "animated.webp": _saved(picture(), "WEBP", **frames),
        "png.jpg": rgb,
        "jpeg.tiff": _saved(picture(), "JPEG"),
        "deep.npy": array.getvalue(),
        "thin.png": _saved(picture("L", (50_000, 1)), "PNG"),  # none with a crop
        "pixel.png": _saved(picture("RGB", (1, 1)), "PNG"),
        os.fsdecode(b"caf\xe9.png"): rgb,
        "two\nlines.png": rgb,
        "n" * 251 + ".png": rgb,
        "n" * 251 + ".jpg": rgb,  # the two share an output
    }
    shared = ("shared.png", "shared.jpg", "SHARED.PNG")
    accents = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    return images | dict.fromkeys((*shared, *accents), rgb)


def _write_links(folder: Path) -> list[str]:
    (folder / "link.png").symlink_to("rgba.png")
    return ["link.png"]
