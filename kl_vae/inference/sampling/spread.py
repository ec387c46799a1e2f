"""How far samples of one image's posterior lie apart, once they are decoded.

C channels, H and W the image's height and width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kl_vae.runtime.outputs import replace_file


class Spread:
    """The mean of images [C, H, W] and the sum of squared deviations from it, both float64."""

    def __init__(self, number: int, mean: Tensor, squares: Tensor) -> None:
        self.number = number
        self.mean = mean
        self.squares = squares

    @classmethod
    def of(cls, images: Tensor) -> Spread:
        """Of images [n, C, H, W]; n = 0 is none."""
        images = images.double()
        if not len(images):
            return cls(0, images.new_zeros(images.shape[1:]), images.new_zeros(images.shape[1:]))
        mean = images.mean(0)
        return cls(len(images), mean, (images - mean).square().sum(0))

    @classmethod
    def join(cls, parts: Iterable[Spread]) -> Spread:
        """Of all parts, of which there is one at least."""
        return functools.reduce(cls.merge, parts)

    def merge(self, other: Spread) -> Spread:
        """Of both (Chan, Golub & LeVeque 1979, equation 2.1)."""
        number = self.number + other.number
        share = other.number / max(number, 1)
        difference = other.mean - self.mean
        return Spread(
            number,
            self.mean + difference * share,
            self.squares + other.squares + difference.square() * (self.number * share),
        )

    @property
    def std(self) -> Tensor:
        """The standard deviation of each value, [C, H, W], of samples: divided by n - 1."""
        return (self.squares / (self.number - 1)).sqrt()

    def save(self, path: Path) -> None:
        """Write a `.npy` of [2, C, H, W]; the number is not in it."""
        save_array(path, torch.stack([self.mean, self.squares]))

    @classmethod
    def load(cls, path: Path, number: int) -> Spread:
        """What `save` wrote of `number` images."""
        mean, squares = torch.from_numpy(np.load(path, allow_pickle=False))
        return cls(number, mean, squares)


def save_array(path: Path, values: Tensor) -> None:
    """Write a tensor as `.npy`.

    Raises:
        ValueError: the file cannot be written.
    """
    stream = BytesIO()
    np.save(stream, values.contiguous().numpy())
    replace_file(path, stream.getvalue())
