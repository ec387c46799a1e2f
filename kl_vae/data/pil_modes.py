"""From a Pillow image of any mode to uint8 [C,H,W].

Shapes: C channels (1, 3 or 4), H height, W width.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# what shows through transparency: white, as on a page
BACKGROUND = 255
MODE_BY_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


def pil_to_tensor(image: Image.Image, channels: int) -> Tensor:
    """Convert a Pillow image to uint8 [C,H,W]: grey, RGB or RGBA.

    Grey is ITU-R 601 luminance. Transparency is composited on white, or kept
    where `channels` is 4. 16-bit greys are scaled to 8 bits by their value.

    Raises:
        ValueError: `channels` is not 1, 3 or 4, or float pixels have no known range.
    """
    if channels not in MODE_BY_CHANNELS:
        raise ValueError(
            f"an image file gives 1, 3 or 4 channels, not {channels}: "
            f"save [height, width, {channels}] arrays as .npy"
        )
    if image.mode.startswith(("I", "F")):
        image = _deep_grey_to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            opaque = Image.new("RGB", image.size, (BACKGROUND,) * 3)
            opaque.paste(image, mask=image.getchannel("A"))
            image = opaque
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # the one mode to which every colour space converts
    pixels = np.array(image.convert(MODE_BY_CHANNELS[channels]))  # [H,W] or [H,W,C]
    height, width = pixels.shape[:2]
    return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1).contiguous()


def _deep_grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Map I;16*, I (16 bits by value) and F (0..1 or 0..255) to L, or to LA with transparency."""
    values = np.array(image)  # [H,W]
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # NaN fails as well
            raise ValueError(
                f"float pixels are from {low:g} to {high:g}: save them in 0..1 or 0..255"
            )
        grey = np.rint(values * 255 if high <= 1 else values)
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"integer pixels are from {low} to {high}: save them in 0..65535")
        grey = (values.astype(np.int32) + 128) // 257  # 65535 = 255 * 257
    grey_image = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")  # the one value that stands for "nothing here"
    if transparent is not None:
        grey_image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype("u1")))
    return grey_image
