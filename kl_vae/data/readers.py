"""Open image files with Pillow, in less memory than it takes of damaged and malicious ones."""

from typing import IO

from PIL import (
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    TiffImagePlugin,
)

# what the bytes may be, whatever the extension says: wrong extensions are common, but
# Pillow's other readers stay out (that of EPS, say, starts Ghostscript)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
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


def open_image(stream: IO[bytes], filename: str) -> ImageFile.ImageFile:
    """Read the header; as `Image.open`, but with no limit of pixels, which is global there.

    `filename` is of a file whose whole content is the image, since Pillow may map it; else empty.
    """
    Image.init()  # fills Image.OPEN, once
    prefix = stream.read(16)
    for name in FORMATS:
        reader, accepts = Image.OPEN[name]
        if accepts is None or accepts(prefix) is True:
            stream.seek(0)
            return {"TIFF": _Tiff, "GIF": _Gif}.get(name, reader)(stream, filename)
    raise ValueError(f"not an image: the bytes are none of {', '.join(FORMATS)}")


def tile_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Return (height, width) of a TIFF's tiles: one takes memory, however small the image is."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1, 1
    tags = (TiffImagePlugin.TILELENGTH, TiffImagePlugin.TILEWIDTH)
    height, width = (image.tag_v2.get(tag, 1) for tag in tags)
    if not (isinstance(height, int) and isinstance(width, int)):
        raise ValueError("the size of its tiles is no number: the file is damaged")
    return height, width


def orientation(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation, 1 to 8, that is yet to be applied; before `load`."""
    if image.format == "TIFF":  # its reader applies the orientation, to `size` as well
        return 1
    try:
        # not image.getexif(): to look for a late EXIF block, PNG's decodes all pixels
        number = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # a picture with damaged EXIF is still a picture
        return 1
    return number if number in TRANSPOSE_BY_ORIENTATION else 1


def load_upright(image: ImageFile.ImageFile) -> Image.Image:
    """Read the pixels and apply the EXIF orientation."""
    method = TRANSPOSE_BY_ORIENTATION.get(orientation(image))
    image.load()
    return image if method is None else image.transpose(method)


def draft(image: ImageFile.ImageFile, short_side: int) -> None:
    """Let a JPEG be decoded at an eighth, a quarter or half of its size, in that much less time.

    Its short side is then `short_side` pixels or more. Only where both sides can be divided so is
    it done: the aspect, and with it all that follows, is then what it was. Before `load`.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return
    width, height = image.size
    for fraction in (8, 4, 2):
        smaller = (width // fraction, height // fraction)
        if width % fraction == height % fraction == 0 and min(smaller) >= short_side:
            image.draft(None, smaller)
            assert image.size == smaller
            return
