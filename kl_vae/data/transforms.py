"""Image transforms: resizing, cropping and augmentation.

Shapes: images are [C,H,W], uint8, or float32 in [0, 1].
"""

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

from kl_vae.data.decoding import MAX_PIXELS

Number = TypeVar("Number", int, NDArray[np.int64])
Sides = int | tuple[int, ...]  # the side of a square, or (height, width), in pixels


def height_and_width(sides: Sides) -> tuple[int, int]:
    """Return the height and width in pixels."""
    if isinstance(sides, int):
        return sides, sides
    height, width = sides
    return height, width


def as_written(sides: Sides) -> int | list[int]:
    """Return the sides as in a configuration: a number or [height, width]."""
    return sides if isinstance(sides, int) else list(sides)


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Resize so that the short side is `size`, keeping the aspect ratio.

    Interpolation is bicubic with antialiasing. Bilinear interpolation would blur the images that
    the autoencoder learns to reproduce.

    Raises:
        ValueError: The result would have more than MAX_PIXELS pixels.
    """
    height, width = image.shape[-2:]
    short = min(height, width)
    if short == size:
        return image
    new_height, new_width = resized_sides(height, width, short, size)
    if new_height * new_width > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels resized to a short side of {size} are too large "
            f"({new_width} x {new_height} pixels): exclude the file, or lower resize"
        )
    # image[None] does not have channels-last strides, and torch would copy it
    inside = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    batch = image[None] if image.is_contiguous() else inside
    resized = F.interpolate(batch, (new_height, new_width), mode="bicubic", antialias=True)[0]
    # bicubic interpolation overshoots at edges; torch clamps only uint8
    return resized.clamp_(0, 1) if resized.is_floating_point() else resized


def resized_sides(height: Number, width: Number, short: Number, size: int) -> tuple[Number, Number]:
    """Return the height and width of images whose short side is resized from `short` to `size`."""
    # rounds half up, unlike round(); exact for the short side
    return (2 * height * size + short) // (2 * short), (2 * width * size + short) // (2 * short)


def random_place(height: int, width: int, size: Sides, generator: Generator) -> tuple[slice, slice]:
    """Return the rows and columns of a uniformly random rectangle of this size.

    Raises:
        ValueError: The image is smaller than `size`.
    """
    rows, columns = _fitting(height, width, size)
    top = int(torch.randint(height - rows + 1, (), generator=generator))
    left = int(torch.randint(width - columns + 1, (), generator=generator))
    return slice(top, top + rows), slice(left, left + columns)


def center_place(height: int, width: int, size: Sides) -> tuple[slice, slice]:
    """Return the rows and columns of the center rectangle of this size.

    If the margin is odd, its larger part is at the bottom and on the right.

    Raises:
        ValueError: The image is smaller than `size`.
    """
    rows, columns = _fitting(height, width, size)
    top, left = (height - rows) // 2, (width - columns) // 2
    return slice(top, top + rows), slice(left, left + columns)


def center_crop(image: Tensor, size: Sides) -> Tensor:
    """Return the center crop, [C,size,size] or [C,*size]; see `center_place`."""
    rows, columns = center_place(image.shape[-2], image.shape[-1], size)
    return image[:, rows, columns]


def random_flip(image: Tensor, generator: Generator) -> Tensor:
    """Mirror the image horizontally with probability 0.5."""
    return image.flip(-1) if torch.rand((), generator=generator) < 0.5 else image


def random_recolor(image: Tensor, generator: Generator) -> Tensor:
    """Blend the image with a random permutation of its channels, with probability 0.5.

    The weight of the permutation is uniform in [0, 1]. With four channels the last one, alpha, is
    not permuted.
    """
    if torch.rand((), generator=generator) >= 0.5:
        return image
    channels = len(image)
    colors = 3 if channels == 4 else channels
    order = torch.arange(channels)
    order[:colors] = torch.randperm(colors, generator=generator)
    share = torch.rand((), generator=generator)
    blended = torch.lerp(image.float(), image[order].float(), share)
    return blended if image.is_floating_point() else blended.round().to(image.dtype)


def channels_inside(image: Tensor) -> Tensor:
    """Copy [C,H,W] to its own channels-last memory.

    A single channel has contiguous strides; the two layouts are the same.
    """
    if len(image) == 1:
        return image.clone(memory_format=torch.contiguous_format)
    return image.permute(1, 2, 0).clone(memory_format=torch.contiguous_format).permute(2, 0, 1)


def _fitting(height: int, width: int, size: Sides) -> tuple[int, int]:
    """Return the height and width of a crop of an image, checked to fit into it."""
    rows, columns = height_and_width(size)
    if height < rows or width < columns:
        raise ValueError(
            f"{width} x {height} is smaller than the crop of {as_written(size)}: "
            "set data.resize, or lower data.crop"
        )
    return rows, columns
