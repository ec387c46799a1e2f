"""From a Pillow image of any mode to uint8 [C,H,W].

Shapes: C channels (1, 3 or 4), H height, W width.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kl_vae.data.tiles import tiles
from kl_vae.data.wanted import EVERYTHING, Wanted

# what shows through transparency: white, as on a page
BACKGROUND = 255
MODE_BY_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


def pil_to_tensor(image: Image.Image, channels: int, wanted: Wanted = EVERYTHING) -> Tensor:
    """Convert a Pillow image to uint8 [C,H,W]: grey, RGB or RGBA.

    In memory it is [H,W,C], as it was decoded: to resize, cut and stack that is faster.

    Grey is ITU-R 601 luminance. Transparency is composited on white, or kept
    where `channels` is 4. 16-bit greys are scaled to 8 bits by their value.
    Of a region that is `wanted` the values are those it has in the whole image.
    Beside the image and the result this takes memory for one tile.

    Raises:
        ValueError: `channels` is not 1, 3 or 4, or float pixels have no known range.
    """
    if channels not in MODE_BY_CHANNELS:
        raise ValueError(
            f"an image file gives 1, 3 or 4 channels, not {channels}: "
            f"save [height, width, {channels}] arrays as .npy"
        )
    white = _white(image) if image.mode.startswith(("I", "F")) else None
    wanted_rows, wanted_columns = wanted.places(image.height, image.width)
    top, left = wanted_rows.start, wanted_columns.start
    height, width = wanted_rows.stop - top, wanted_columns.stop - left
    converted = np.empty((height, width) if channels == 1 else (height, width, channels), np.uint8)
    for rows, columns in tiles(height, width):
        box = (left + columns.start, top + rows.start, left + columns.stop, top + rows.stop)
        tile = image if box == (0, 0, *image.size) else image.crop(box)
        if white is not None:
            tile = _deep_grey_to_8_bits(tile, white)
        converted[rows, columns] = np.asarray(_in_mode_of(channels, tile))
    result = torch.from_numpy(converted)  # [H,W] or [H,W,C]
    return result[None] if channels == 1 else result.permute(2, 0, 1)


def _in_mode_of(channels: int, image: Image.Image) -> Image.Image:
    mode = MODE_BY_CHANNELS[channels]
    if image.has_transparency_data:
        image = _converted(image, "RGBA")
        if channels != 4:
            opaque = Image.new("RGB", image.size, (BACKGROUND,) * 3)
            opaque.paste(image, mask=image.getchannel("A"))
            image = opaque
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # the one mode to which every colour space converts
    return _converted(image, mode)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which would copy


def _white(image: Image.Image) -> int:
    """Return the value that stands for white in I;16* and I (16 bits) and F (0..1 or 0..255)."""
    ranges = []
    for rows, columns in tiles(image.height, image.width):
        values = np.array(image.crop((columns.start, rows.start, columns.stop, rows.stop)))
        ranges.append((values.min(), values.max()))
    low, high = np.min(ranges), np.max(ranges)
    if image.mode != "F":
        if low < 0 or high > 65535:
            raise ValueError(f"integer pixels are from {low} to {high}: save them in 0..65535")
        return 65535
    if not (low >= 0 and high <= 255):  # NaN fails as well
        raise ValueError(f"float pixels are from {low:g} to {high:g}: save them in 0..1 or 0..255")
    return 1 if high <= 1 else 255


def _deep_grey_to_8_bits(image: Image.Image, white: int) -> Image.Image:
    """Map greys from 0 to `white` to L, or to LA with transparency."""
    values = np.array(image)  # [H,W]
    if white == 65535:
        grey = (values.astype(np.int32) + 128) // 257  # 65535 = 255 * 257
    else:
        grey = np.rint(values * (255 / white))
    grey_image = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")  # the one value that stands for "nothing here"
    if transparent is not None:
        grey_image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype("u1")))
    return grey_image
