"""From a decoded image to a square crop.

Shapes: images are [C,H,W], uint8, or float32 in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kl_vae.data.decoding import MAX_PIXELS


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Resize so that the short side is `size`; the aspect is kept.

    Bicubic, since bilinear blurs what the autoencoder is then taught to
    reproduce; antialiased, since it would alias when it makes images smaller.

    Raises:
        ValueError: the image is so long and thin that the result would not fit into memory.
    """
    height, width = image.shape[-2:]
    short = min(height, width)
    if short == size:
        return image
    # round(x + 1/2) downwards, where round() would go to the even side; exact for the short side
    new_height, new_width = ((2 * side * size + short) // (2 * short) for side in (height, width))
    if new_height * new_width > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels would become {new_width} x {new_height} at a short side "
            f"of {size}: leave the file out, or resize to less"
        )
    # image[None] has no strides by which torch sees that channels are inside: it would copy it
    inside = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    batch = image[None] if image.is_contiguous() else inside
    resized = F.interpolate(batch, (new_height, new_width), mode="bicubic", antialias=True)[0]
    # bicubic overshoots at edges; torch clamps uint8 alone
    return resized.clamp_(0, 1) if resized.is_floating_point() else resized


def random_place(height: int, width: int, size: int, generator: Generator) -> tuple[slice, slice]:
    """Draw the rows and columns of a square of side `size` uniformly.

    Raises:
        ValueError: the image is smaller.
    """
    _check_fits(height, width, size)
    top = int(torch.randint(height - size + 1, (), generator=generator))
    left = int(torch.randint(width - size + 1, (), generator=generator))
    return slice(top, top + size), slice(left, left + size)


def center_place(height: int, width: int, size: int) -> tuple[slice, slice]:
    """Return the rows and columns in the middle; an odd rest of one is left below and right.

    Raises:
        ValueError: the image is smaller.
    """
    _check_fits(height, width, size)
    top, left = (height - size) // 2, (width - size) // 2
    return slice(top, top + size), slice(left, left + size)


def center_crop(image: Tensor, size: int) -> Tensor:
    """Cut [C,size,size] out of the middle; an odd rest of one pixel is left below and right."""
    rows, columns = center_place(image.shape[-2], image.shape[-1], size)
    return image[:, rows, columns]


def random_flip(image: Tensor, generator: Generator) -> Tensor:
    """Mirror left and right with a probability of one half."""
    return image.flip(-1) if torch.rand((), generator=generator) < 0.5 else image


def random_recolor(image: Tensor, generator: Generator) -> Tensor:
    """Blend the image with a permutation of its channels, with a probability of one half.

    The share of the permutation is uniform in [0, 1]. Of four channels the last, alpha, stays.
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
    """Copy [C,H,W] so that in memory it is [H,W,C], and no part of something larger.

    Of one channel both orders are the same, and it has the strides of [C,H,W].
    """
    if len(image) == 1:
        return image.clone(memory_format=torch.contiguous_format)
    return image.permute(1, 2, 0).clone(memory_format=torch.contiguous_format).permute(2, 0, 1)


def _check_fits(height: int, width: int, size: int) -> None:
    if min(height, width) < size:
        raise ValueError(
            f"{width} x {height} is smaller than the crop of {size}: "
            "set data.resize, or lower data.crop"
        )
