"""PNG files: chunks that matter for pixels, and 16-bit pixels, which Pillow reduces to 8 bits."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 2**21 + 2**16  # bytes of an ICC profile, decompressed
MAX_TEXT = 2**16  # bytes of a text chunk with EXIF
_GREY, _RGB, _GREY_ALPHA = 0, 2, 4  # colour types; 6 is RGBA
# ancillary chunks that are kept; of text chunks, those that may state an orientation
_KEPT = (b"tRNS", b"eXIf")
_TEXT = (b"Raw profile type exif", b"XML:com.adobe.xmp")


class PngChunks(NamedTuple):
    """The parts of a PNG file that its pixels depend on.

    Attributes:
        file: the file without other ancillary chunks.
        profile: its ICC profile.
        depth: bits per sample.
        color_type: of the header.
        significant: bits per sample of the original data (`sBIT`); 0: not stated.
        transparency: content of tRNS.
        animated: whether the file has more frames.
    """

    file: io.BytesIO
    profile: bytes | None
    depth: int
    color_type: int
    significant: int
    transparency: bytes | None
    animated: bool

    @property
    def transparent(self) -> tuple[int, ...] | None:
        """Value per colour of transparent pixels in a file of 16 bits."""
        if self.transparency is None:
            return None
        return struct.unpack(f">{len(self.transparency) // 2}H", self.transparency)


class PngReader(PngImagePlugin.PngImageFile):
    """Reader that ignores chunks which the pixels do not depend on.

    Attributes:
        chunks: of the file.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.chunks = read_chunks(stream)
        super().__init__(self.chunks.file, name)
        if self.chunks.profile is not None:
            self.info["icc_profile"] = self.chunks.profile


def read_chunks(stream: BinaryIO) -> PngChunks:
    """Read the chunks of a PNG file; damaged ancillary chunks are skipped, as by libpng."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    file = io.BytesIO()
    file.write(stream.read(len(SIGNATURE)))
    profile, transparency, significant, animated = None, None, 0, False
    depth, color_type = 8, _GREY
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"acTL":
            animated = True
        ancillary = bool(kind[0] & 0x20)
        wanted = kind in (*_KEPT, b"iCCP", b"sBIT", b"tEXt", b"zTXt", b"iTXt")
        if ancillary and not wanted:
            stream.seek(length + 4, io.SEEK_CUR)
            continue
        content = stream.read(min(length + 4, size))
        body, checksum = content[:length], content[length:]
        if ancillary and checksum != struct.pack(">I", zlib.crc32(kind + body)):
            continue
        if kind == b"IHDR" and length > 9:
            depth, color_type = body[8], body[9]
        elif kind == b"iCCP":
            profile = _decompressed(body.partition(b"\0")[2])
        elif kind == b"tRNS":
            transparency = body if len(body) % 2 == 0 else None
        elif kind == b"sBIT":
            significant = max(body[:3], default=0)
        with_orientation = body.startswith(_TEXT) and length <= MAX_TEXT
        if not ancillary or kind in _KEPT or with_orientation:
            file.write(head)
            file.write(content)
        if kind == b"IEND":
            break
    file.seek(0)
    return PngChunks(file, profile, depth, color_type, significant, transparency, animated)


def _decompressed(content: bytes) -> bytes | None:
    """Return the profile of an iCCP chunk after its name; None: it cannot be decompressed."""
    if content[:1] != b"\0":  # the compression method
        return None
    try:
        return zlib.decompressobj().decompress(content[1:], MAX_PROFILE)
    except zlib.error:
        return None


def read_16_bits(chunks: PngChunks) -> NDArray[np.uint16]:
    """Return the samples [H,W,C] of a file of 16 bits; C is 1 to 4, the last of 2 or 4 is alpha.

    Pillow decodes grey to 16 bits. Of colours it keeps one of the two bytes of each sample: the
    upper one when told that the samples are big-endian, which they are, and the lower one when told
    that they are little-endian.
    """

    def decoded(mode: str | None = None, raw_mode: str | None = None) -> NDArray[Any]:
        image = PngImagePlugin.PngImageFile(io.BytesIO(chunks.file.getbuffer()))
        if mode is not None:
            image._mode = mode
            image.tile = [(*tile[:3], raw_mode) for tile in image.tile]  # type: ignore[misc]
        image.load()
        return np.asarray(image)

    if chunks.color_type == _GREY:
        return decoded().astype(np.uint16)[:, :, None]
    values: NDArray[np.uint16]
    if chunks.color_type == _GREY_ALPHA:  # 4 bytes per pixel, as 8-bit RGBA
        both = decoded("RGBA", "RGBA")
        values, lower = both[:, :, ::2].astype(np.uint16), both[:, :, 1::2]
    else:
        mode = "RGB" if chunks.color_type == _RGB else "RGBA"
        values = decoded(mode, f"{mode};16B").astype(np.uint16)
        lower = decoded(mode, f"{mode};16L")
    values <<= 8
    values |= lower
    return values


def stated_bits(values: NDArray[np.uint16], significant: int) -> int | None:
    """Return the depth of 16-bit values whose file states `significant` bits; None: 16 bits.

    The standard scales n bits to 16 by repeating their upper bits in the lower ones. Values that do
    not repeat them and fit into n bits are not scaled.
    """
    if not 8 <= significant < 16 or int(values.max()) >= 2**significant:
        return None
    repeated = (values & (2 ** (16 - significant) - 1)) == values >> significant
    return None if repeated.all() else significant


def encode_16_bits(values: NDArray[np.uint16]) -> bytes:
    """Return a PNG file of samples [H,W,C], C = 1, 3 or 4; Pillow writes only one channel."""
    height, width, channels = values.shape
    color_type = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = np.zeros((height, 1 + 2 * channels * width), np.uint8)  # the first byte: no filter
    rows[:, 1:] = values.astype(">u2").reshape(height, -1).view(np.uint8)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum
