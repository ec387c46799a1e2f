"""Images of many sizes: padded to sizes that the model takes, in batches of one size each.

C channels, H and W the image's height and width, z latent channels, h and w the latents' height and
width, f = H / h once the image is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from kl_vae.model import AutoEncoderKL, padded_size

# pixels of an image up to which a batch has its full number of images; fewer of larger ones
FULL_BATCH_PIXELS = 512 * 512
# pixels of the images that wait for others of their size: 200 MB of RGB
WAITING_PIXELS = 2**24

Size = tuple[int, int]
Numbered = tuple[int, Tensor]  # an image [C, H, W] by its index


def latent_noise(model: AutoEncoderKL, image: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise for a sample of the posterior of [C, H, W], [z, h, w]."""
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
    """Group images of one size; the batches depend on the images alone.

    A batch holds `batch_size` images of up to 512 x 512 pixels, and of larger ones as many as have
    the pixels of those, at least one. No more images wait than fit into 200 MB.

    Args:
        images: in their order, which is also that within a batch.
        size_of: gives the height and width that images of one batch share.
        batch_size: images in a batch, at most.
        consecutive: only neighbours share a batch, so that the order of all images is kept.
    """
    waiting: dict[Size, list[Numbered]] = {}
    for number, image in images:
        size = size_of(image)
        if consecutive and waiting and size not in waiting:
            yield waiting.popitem()[1]
        group = waiting.setdefault(size, [])
        group.append((number, image))
        if len(group) >= _most(size, batch_size):
            yield waiting.pop(size)
        elif not consecutive and _pixels(waiting) > WAITING_PIXELS:
            largest = max(waiting, key=lambda size: _pixels({size: waiting[size]}))
            yield waiting.pop(largest)
    yield from waiting.values()


def _most(size: Size, batch_size: int) -> int:
    height, width = size
    return max(1, min(batch_size, batch_size * FULL_BATCH_PIXELS // (height * width)))


def _pixels(groups: dict[Size, list[Numbered]]) -> int:
    return sum(height * width * len(group) for (height, width), group in groups.items())
