"""TIFF files: what their tags state, and the pixels that Pillow cannot read, with tifffile.

Tags are those of TIFF 6.0. Pillow reads greys of up to 16 bits, 32-bit floats and 8-bit colours.
Other depths, extra bands and separate planes need tifffile (`pip install 'kl-vae[formats]'`).

Shapes: C bands, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, BinaryIO, NamedTuple

from numpy.typing import NDArray
from PIL import TiffImagePlugin

# maximum number of tiles or strips; 178,956,970 pixels in 32 x 32 tiles are fewer
MAX_TILES = 2**18
# limits of the format, and of numbers: two of 64 bits
_MAX_BANDS, _MAX_BITS = 2**16 - 1, 128
# by PhotometricInterpretation: the number of colour bands, and the mode of Pillow
_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_MODES = {0: "L", 1: "L", 2: "RGB", 5: "CMYK"}
_MIN_IS_WHITE, _MIN_IS_BLACK = 0, 1
_ALPHA = (1, 2)  # ExtraSamples: premultiplied, straight
# NewSubfileType: a page that is a smaller copy of another one, or its mask
_NOT_AN_IMAGE = 0b101
_NEW_SUBFILE_TYPE, _ORIENTATION, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 254, 274, 338, 339


class TiffReader(TiffImagePlugin.TiffImageFile):
    """Reader of the header, also of files whose pixels Pillow cannot read.

    Attributes:
        unreadable: why Pillow cannot read the pixels; empty if it can.
        min_is_white: whether the lowest value is white.
    """

    unreadable = ""
    min_is_white = False

    @property
    def orientation(self) -> int:
        """The EXIF orientation, 1 to 8; Pillow applies it to `size` and to what it reads."""
        number = self.tag_v2.get(_ORIENTATION)
        return number if isinstance(number, int) and 1 <= number <= 8 else 1

    @property
    def profile(self) -> bytes | None:
        """The ICC profile."""
        profile = self.tag_v2.get(TiffImagePlugin.ICCPROFILE)
        return profile if isinstance(profile, bytes) else None

    def _setup(self) -> None:
        self.unreadable = ""
        photometric = self.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        self.min_is_white = photometric == _MIN_IS_WHITE
        if self.min_is_white and self.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
            # Pillow reads 12 bits only as min-is-black
            self.tag_v2[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = _MIN_IS_BLACK
        # Pillow allocates 300 bytes per tile while it reads the header, and a damaged file may
        # list millions
        for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS):
            number = len(self.tag_v2.get(tag, ()))
            if number > MAX_TILES:
                raise ValueError(
                    f"{number} tiles or strips are more than {MAX_TILES}: save the image with "
                    "larger ones"
                )
        try:
            super()._setup()
        except (SyntaxError, KeyError, IndexError) as error:  # an unknown combination of tags
            width, height = (self.tag_v2.get(tag) for tag in (256, 257))
            if not (isinstance(width, int) and isinstance(height, int) and width * height > 0):
                raise
            self.unreadable = str(error) or "unknown pixel format"
            self._size = (height, width) if self.orientation >= 5 else (width, height)
            self._mode, self.tile = "L", []


class TiffTags(NamedTuple):
    """What the tags of a page state about its pixels.

    Attributes:
        bits: per sample; the largest, if they differ.
        kind: `u`, `i` or `f`: unsigned or signed integers, floats.
        photometric: PhotometricInterpretation.
        bands: samples per pixel.
        extra: ExtraSamples, per band that is no colour; 0: unspecified.
    """

    bits: int
    kind: str
    photometric: int
    bands: int
    extra: tuple[int, ...]

    @property
    def mode(self) -> str | None:
        """Pillow's mode of the colour bands; None: the bands are no colours."""
        mode = _MODES.get(self.photometric)
        if mode is None or (self.extra and not self.has_alpha):
            return None
        return mode

    @property
    def has_alpha(self) -> bool:
        """Whether the only extra band is alpha."""
        return len(self.extra) == 1 and self.extra[0] in _ALPHA

    @property
    def needs_tifffile(self) -> bool:
        """Whether Pillow cannot read the pixels, drops bands, or reduces them to 8 bits."""
        if self.bands == 1 and self.bits > 8:
            return f"{self.kind}{self.bits}" not in ("u12", "u16", "f32")
        return self.bits > 8 or self.kind != "u" or (bool(self.extra) and not self.has_alpha)

    def __str__(self) -> str:
        """Return a description such as `4 x uint16`."""
        names = {"u": "uint", "i": "int", "f": "float"}
        return f"{self.bands} x {names[self.kind]}{self.bits}"


def tags_of(image: TiffImagePlugin.TiffImageFile) -> TiffTags:
    """Return what the tags of the current page state."""

    def numbers(tag: int, default: int) -> tuple[int, ...]:
        value = image.tag_v2.get(tag, default)
        found = value if isinstance(value, tuple) else (value,)
        if not found or not all(isinstance(number, int) for number in found):
            raise ValueError(f"the TIFF tag {tag} is damaged: save the image again")
        return found

    bands = numbers(TiffImagePlugin.SAMPLESPERPIXEL, 1)[0]
    bits = max(numbers(TiffImagePlugin.BITSPERSAMPLE, 1))
    if not (1 <= bands <= _MAX_BANDS and 1 <= bits <= _MAX_BITS):
        raise ValueError(f"{bands} bands of {bits} bits: the file is damaged; save the image again")
    photometric = numbers(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1)[0]
    formats = numbers(_SAMPLE_FORMAT, 1)
    extra_bands = max(0, bands - _COLORS.get(photometric, bands))
    stated = numbers(_EXTRA_SAMPLES, 0)
    return TiffTags(
        bits=bits,
        kind={2: "i", 3: "f"}.get(formats[0], "u"),
        photometric=photometric,
        bands=bands,
        extra=(stated + (0,) * extra_bands)[:extra_bands],
    )


def page_numbers(image: TiffImagePlugin.TiffImageFile) -> list[int]:
    """Return the pages that are images, not masks or smaller copies; leave page 0 selected."""
    pages = []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        kind = image.tag_v2.get(_NEW_SUBFILE_TYPE, 0)
        if number == 0 or not (isinstance(kind, int) and kind & _NOT_AN_IMAGE):
            pages.append(number)
    image.seek(0)
    return pages


def read_bands(
    stream: BinaryIO, page: int, tags: TiffTags, orientation: int, max_bytes: int
) -> NDArray[Any]:
    """Return the stored samples [H,W,C] of a page, with the orientation applied.

    Args:
        stream: the file.
        page: number of the page.
        tags: of the page, for messages.
        orientation: EXIF orientation, 1 to 8.
        max_bytes: of the samples, and of a tile.

    Raises:
        ValueError: tifffile is not installed or cannot read the page, or it takes more memory.
    """
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            f"a TIFF of {tags} samples needs tifffile: pip install 'kl-vae[formats]'"
        ) from None
    stream.seek(0)
    with _without_log_of_tifffile(), tifffile.TiffFile(stream) as file:
        found = file.pages[page]
        axes = found.axes
        if axes not in ("SYX", "YX", "YXS"):
            raise ValueError(f"a TIFF with axes {axes}: save [height, width, channels] as .npy")
        needed = max(found.nbytes, prod(found.chunks) * found.dtype.itemsize)
        if needed > max_bytes:
            raise ValueError(
                f"{tags} samples of {found.shape} take {needed} bytes, more than {max_bytes}: "
                "increase max_pixels, or exclude the file"
            )
        array = found.asarray(maxworkers=1)
    if axes == "SYX":
        array = array.transpose(1, 2, 0)
    elif axes == "YX":
        array = array[:, :, None]
    return oriented(array, orientation)


@contextmanager
def _without_log_of_tifffile() -> Iterator[None]:
    """Keep tifffile from logging what is wrong with a file; its errors say so, too."""
    log = logging.getLogger("tifffile")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def oriented(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Apply an EXIF orientation, 1 to 8, to [H,W,C]."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return array[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
