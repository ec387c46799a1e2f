"""Images of many sizes in batches of one size each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from kl_vae.inference.padding import padded_size

# of an image, in pixels, up to which a batch is full at its number; of larger ones it holds fewer
FULL_BATCH_PIXELS = 512 * 512
# of images that wait for others of their size: 200 MB of RGB
WAITING_PIXELS = 2**24

Numbered = tuple[int, Tensor]  # an image [C, H, W] by its index


def batches_of_a_size(
    images: Iterable[Numbered], factor: int, batch_size: int
) -> Iterator[list[Numbered]]:
    """Group images that are padded to one size; the batches depend on the images alone.

    A batch holds `batch_size` images of up to 512 x 512 pixels, and of larger ones as many as have
    the pixels of those, at least one. No more images wait than fit into 200 MB.

    Args:
        images: in their order, in which those of a batch are, too.
        factor: f, to whose multiples they are padded.
        batch_size: images in a batch, at most.
    """
    waiting: dict[tuple[int, int], list[Numbered]] = {}
    for number, image in images:
        size = padded_size(image, factor)
        group = waiting.setdefault(size, [])
        group.append((number, image))
        if len(group) >= _most(size, batch_size):
            yield waiting.pop(size)
        elif sum(_pixels(size, group) for size, group in waiting.items()) > WAITING_PIXELS:
            largest = max(waiting, key=lambda size: _pixels(size, waiting[size]))
            yield waiting.pop(largest)
    yield from waiting.values()


def _most(size: tuple[int, int], batch_size: int) -> int:
    height, width = size
    return max(1, min(batch_size, batch_size * FULL_BATCH_PIXELS // (height * width)))


def _pixels(size: tuple[int, int], group: list[Numbered]) -> int:
    height, width = size
    return height * width * len(group)
