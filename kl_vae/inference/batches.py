"""Batches of images of different sizes: each batch holds images of one padded size.

Shapes: C channels, H and W image height and width, z latent channels, h and w latent height and
width, f = H / h after padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from kl_vae.model import AutoEncoderKL, padded_size

# largest image for which a batch holds `batch_size` images; batches of larger images are smaller
FULL_BATCH_PIXELS = 512 * 512
# limit on the pixels of buffered images in incomplete batches: 200 MB of RGB
WAITING_PIXELS = 2**24

Size = tuple[int, int]
Numbered = tuple[int, Tensor]  # index and image [C, H, W]


def latent_noise(model: AutoEncoderKL, image: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise [z, h, w] to sample the posterior of an image [C, H, W]."""
    factor = model.downsampling_factor
    height, width = padded_size(image, factor)
    shape = (model.latent_channels, height // factor, width // factor)
    return torch.randn(shape, generator=generator, device=generator.device)


def batches_of_a_size(
    images: Iterable[Numbered],
    size_of: Callable[[Tensor], Size],
    batch_size: int,
    *,
    consecutive: bool = False,
) -> Iterator[list[Numbered]]:
    """Group images of the same size into batches.

    The batches depend only on the images. A batch holds `batch_size` images of up to 512 x 512
    pixels; for larger images it holds as many as have the same total number of pixels, and at
    least one. Buffered images take at most 200 MB.

    Args:
        images: indexed images; their order is kept within each batch.
        size_of: returns the height and width by which images are grouped.
        batch_size: maximum number of images in a batch.
        consecutive: group only consecutive images, which keeps the overall order.
    """
    waiting: dict[Size, list[Numbered]] = {}
    for number, image in images:
        size = size_of(image)
        if consecutive and waiting and size not in waiting:
            yield waiting.popitem()[1]
        group = waiting.setdefault(size, [])
        group.append((number, image))
        if len(group) >= _batch_limit(size, batch_size):
            yield waiting.pop(size)
        elif not consecutive and _pixels(waiting) > WAITING_PIXELS:
            largest = max(waiting, key=lambda size: _pixels({size: waiting[size]}))
            yield waiting.pop(largest)
    yield from waiting.values()


def _batch_limit(size: Size, batch_size: int) -> int:
    height, width = size
    return max(1, min(batch_size, batch_size * FULL_BATCH_PIXELS // (height * width)))


def _pixels(groups: dict[Size, list[Numbered]]) -> int:
    return sum(height * width * len(group) for (height, width), group in groups.items())
