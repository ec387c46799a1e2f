"""Several images in one, and images in files.

Images are uint8 [3, H, W].
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from kl_vae.runtime.outputs import replace_file

DIFFERENCE_GAIN = 4
MAX_SIDE = 512  # of a cell, in pixels
GAP = 2  # white pixels between cells
WHITE = 255
COLUMNS = ("input", "reconstruction", f"difference x {DIFFERENCE_GAIN}")
MIN_COLUMN = 192  # pixels, for the text above three of them
FONT_SIZE = 13
TEXT_HEIGHT = 20


def image_grid(images: Iterable[Tensor], columns: int, max_side: int = MAX_SIDE) -> Tensor:
    """Lay images out row by row, in equal cells as large as the largest image, on white.

    Images above `max_side` are made smaller; none is made larger.
    """
    images = [_fit(image, max_side) for image in images]
    height = max(image.shape[1] for image in images) + GAP
    width = max(image.shape[2] for image in images) + GAP
    rows = -(-len(images) // columns)
    grid = images[0].new_full((3, rows * height + GAP, columns * width + GAP), WHITE)
    for i, image in enumerate(images):
        top = GAP + i // columns * height + (height - GAP - image.shape[1]) // 2
        left = GAP + i % columns * width + (width - GAP - image.shape[2]) // 2
        grid[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return grid


def comparison_row(
    image: Tensor, reconstruction: Tensor, max_side: int | None = MAX_SIDE
) -> list[Tensor]:
    """Return image, reconstruction and their absolute difference times 4, fitted to `max_side`."""
    difference = (image.int() - reconstruction.int()).abs() * DIFFERENCE_GAIN
    row = [image, reconstruction, difference.clamp(max=255).to(torch.uint8)]
    return [_fit(x, max_side) for x in row]


def comparison_grid(
    inputs: Sequence[Tensor] | Tensor,
    reconstructions: Sequence[Tensor] | Tensor,
    max_side: int = MAX_SIDE,
) -> Tensor:
    """Rows of input | reconstruction | absolute difference times 4.

    Args:
        inputs: images, each of its own size, or a batch [B, 3, H, W].
        reconstructions: as many, each of its input's size.
        max_side: larger images are made smaller, after the difference was taken.
    """
    pairs = zip(inputs, reconstructions, strict=True)
    return image_grid([cell for pair in pairs for cell in comparison_row(*pair, max_side)], 3)


def sheet_header(width: int) -> Tensor:
    """Return the names of the columns of `sheet_row`s of this width, uint8 [3, H, W]."""
    sheet, draw = _sheet(width, 0)
    for i, name in enumerate(COLUMNS):
        draw.text((GAP + i * (width + GAP), 0), name, fill="black", font=_font())
    return _tensor(sheet)


def sheet_row(name: str, metrics: str, image: Tensor, reconstruction: Tensor, width: int) -> Tensor:
    """Return input, reconstruction and difference below a line of text, uint8 [3, H, W].

    Args:
        name: of the image; a long one loses its middle.
        metrics: text at the right.
        image: uint8 [3, H, W].
        reconstruction: of the same size.
        width: of a column, in pixels: that of each image, unless it is then higher than twice
            that.
    """
    height, most = image.shape[1] * width / image.shape[2], 2 * width
    scale = min(1.0, most / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    sheet, draw = _sheet(width, size[1] + GAP)
    font = _font()
    room = sheet.width - 2 * GAP
    draw.text((GAP + room - font.getlength(metrics), 0), metrics, fill="black", font=font)
    room -= int(font.getlength(f"{metrics}  "))
    draw.text((GAP, 0), shortened(name, room, font.getlength), fill="black", font=font)
    for i, cell in enumerate(comparison_row(image, reconstruction, max_side=None)):
        left = GAP + i * (width + GAP) + (width - size[0]) // 2
        sheet.paste(_scaled(cell, size), (left, TEXT_HEIGHT))
    return _tensor(sheet)


def shortened(text: str, room: float, length: Callable[[str], float]) -> str:
    """Return the text, or its beginning and end with ... between, no longer than `room`."""
    if length(text) <= room:
        return text
    for kept in range(min(len(text) - 1, max(0, int(room))), 0, -1):
        short = f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
        if length(short) <= room:
            return short
    return "..."


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _sheet(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white image of three columns of this width, with room for text above."""
    size = (len(COLUMNS) * (width + GAP) + GAP, TEXT_HEIGHT + height)
    sheet = Image.new("RGB", size, "white")
    return sheet, ImageDraw.Draw(sheet)


def _scaled(pixels: Tensor, size: tuple[int, int]) -> Image.Image:
    """An image of this width and height; whole multiples keep the pixels as they are."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    whole = all(new % old == 0 for new, old in zip(size, image.size, strict=True))
    return image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def save_png(path: Path, image: Tensor, texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write uint8 [C, H, W] with C = 1, 3 or 4 as a PNG; the file is there whole or not at all.

    Args:
        path: the file.
        image: the image.
        texts: ASCII texts to store, by their keywords of up to 79 characters.

    Raises:
        ValueError: the file cannot be written.
    """
    pixels = image.permute(1, 2, 0).squeeze(2).cpu().numpy()  # [H, W, C], or [H, W] where C is 1
    stream = BytesIO()
    chunks = PngInfo()
    for keyword, text in texts.items():
        chunks.add_text(keyword, text)
    Image.fromarray(pixels).save(stream, format="PNG", pnginfo=chunks)
    replace_file(path, stream.getvalue())


def _fit(image: Tensor, max_side: int | None) -> Tensor:
    height, width = image.shape[1:]
    longest = max(height, width)
    if max_side is None or longest <= max_side:
        return image
    size = [max(1, round(side * max_side / longest)) for side in (height, width)]
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return small.round().clamp(0, 255).to(torch.uint8)
