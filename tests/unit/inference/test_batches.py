"""Images of many sizes in batches of one size each."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kl_vae.inference import batches
from kl_vae.inference.batches import batches_of_a_size
from kl_vae.model import padded_size


def numbered(*sizes: tuple[int, int]) -> list[tuple[int, Tensor]]:
    """Images that take no memory."""
    return [(i, torch.zeros(1).expand(3, *size)) for i, size in enumerate(sizes)]


def indices(images: list[tuple[int, Tensor]], batch_size: int) -> list[list[int]]:
    found = batches_of_a_size(images, partial(padded_size, factor=8), batch_size)
    return [[index for index, _ in batch] for batch in found]


def test_images_wait_for_others_of_their_padded_size() -> None:
    images = numbered((9, 17), (20, 20), (16, 24), (24, 17), (15, 18), (12, 23))
    assert indices(images, 2) == [[0, 2], [1, 3], [4, 5]]
    assert indices(images, 3) == [[0, 2, 4], [1, 3], [5]]
    assert indices(images, 1) == [[i] for i in range(6)]
    assert indices([], 3) == []


def test_large_images_are_few_in_a_batch() -> None:
    assert indices(numbered(*[(1024, 1024)] * 5), 8) == [[0, 1], [2, 3], [4]]
    assert indices(numbered(*[(4096, 1000)] * 2), 8) == [[0], [1]]


def test_not_too_many_pixels_wait(monkeypatch) -> None:
    monkeypatch.setattr(batches, "WAITING_PIXELS", 5 * 16 * 16)
    images = numbered((16, 16), (16, 32), (16, 48), (16, 32), (16, 16))
    assert indices(images, 8) == [[2], [1, 3], [0, 4]]


def test_neighbours_of_one_size_keep_the_order() -> None:
    images = numbered((8, 8), (8, 8), (8, 8), (9, 8), (8, 8), (1024, 1024), (1024, 1024))

    def of(batch_size: int) -> list[list[int]]:
        found = batches_of_a_size(
            images, lambda image: (image.shape[1], image.shape[2]), batch_size, consecutive=True
        )
        return [[index for index, _ in batch] for batch in found]

    assert of(2) == [[0, 1], [2], [3], [4], [5], [6]]
    assert of(8) == [[0, 1, 2], [3], [4], [5, 6]]
