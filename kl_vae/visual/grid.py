"""Several pictures in one, and pictures in files.

Pictures are uint8 [3, H, W].
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kl_vae.runtime.outputs import replace_file

DIFFERENCE_GAIN = 4
MAX_SIDE = 512  # of a cell, in pixels
GAP = 2  # white pixels between cells
WHITE = 255


def image_grid(images: Iterable[Tensor], columns: int, max_side: int = MAX_SIDE) -> Tensor:
    """Lay pictures out row by row, in equal cells as large as the largest picture, on white.

    Pictures above `max_side` are made smaller; none is made larger.
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


def comparison_row(image: Tensor, reconstruction: Tensor, max_side: int = MAX_SIDE) -> list[Tensor]:
    """Return image, reconstruction and their absolute difference times 4, fitted to `max_side`."""
    difference = (image.int() - reconstruction.int()).abs() * DIFFERENCE_GAIN
    row = [image, reconstruction, difference.clamp(max=255).to(torch.uint8)]
    return [_fit(picture, max_side) for picture in row]


def comparison_grid(
    inputs: Sequence[Tensor] | Tensor,
    reconstructions: Sequence[Tensor] | Tensor,
    max_side: int = MAX_SIDE,
) -> Tensor:
    """Rows of input | reconstruction | absolute difference times 4.

    Args:
        inputs: pictures, each of its own size, or a batch [B, 3, H, W].
        reconstructions: as many, each of its input's size.
        max_side: larger pictures are made smaller, after the difference was taken.
    """
    pairs = zip(inputs, reconstructions, strict=True)
    return image_grid([cell for pair in pairs for cell in comparison_row(*pair, max_side)], 3)


def save_png(path: Path, image: Tensor) -> None:
    """Write uint8 [C, H, W] with C = 1, 3 or 4 as a PNG; the file is there whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    pixels = image.permute(1, 2, 0).squeeze(2).cpu().numpy()  # [H, W, C], or [H, W] where C is 1
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    replace_file(path, stream.getvalue())


def _fit(image: Tensor, max_side: int) -> Tensor:
    height, width = image.shape[1:]
    longest = max(height, width)
    if longest <= max_side:
        return image
    size = [max(1, round(side * max_side / longest)) for side in (height, width)]
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return small.round().clamp(0, 255).to(torch.uint8)
