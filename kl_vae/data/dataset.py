"""A data set: the crop of an image that a key stands for.

Shapes: C channels; an image is [C,crop,crop].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kl_vae.data.images import ImageError, to_float
from kl_vae.data.sampler import Key
from kl_vae.data.source import Source
from kl_vae.data.transforms import (
    center_crop,
    random_crop,
    random_flip,
    random_recolor,
    resize_short_side,
)
from kl_vae.randomness import generator_for


class Sample(NamedTuple):
    """One image, or zeros and the reason why there is none."""

    image: Tensor  # [C,crop,crop], float32 in [-1, 1]
    position: int  # in the global batch (training) or in the validation set
    error: str  # empty where the image was read


class ImageDataset(Dataset[Sample]):
    """Crops of a source's images, each a function of (seed, epoch, index) alone.

    In training a crop is cut out at random, with `flip` mirrored half of the
    time and with `recolor` recoloured half of the time; otherwise it is
    the middle, and nothing is drawn. `resize` is the length that the short side
    is given first; None leaves images as they are.
    """

    def __init__(
        self,
        source: Source,
        crop: int,
        resize: int | None,
        flip: bool,
        seed: int,
        training: bool,
        recolor: bool = False,
    ) -> None:
        self.source = source
        self.crop = crop
        self.resize = resize
        self.flip = flip
        self.seed = seed
        self.training = training
        self.recolor = recolor

    @property
    def fingerprint(self) -> str:
        """32 hex digits that change when the images do."""
        return self.source.fingerprint

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample of (epoch, index, position); a file's error is in it, never raised."""
        epoch, index, position = key
        try:
            return Sample(self._prepare(self.source.read(index), epoch, index), position, "")
        except ImageError as error:
            message = str(error)
        except ValueError as error:  # of the transforms, which know no names
            message = f"{self.source.name(index)}: {error}"
        blank = torch.zeros(self.source.channels, self.crop, self.crop)
        return Sample(blank, position, message)

    def check_sizes(self) -> None:
        """Read every header, where images are not resized: no run ends at a small one.

        Raises:
            ValueError: the first image that is smaller than the crop, or unreadable.
        """
        if self.resize is not None:
            return
        for index in range(len(self)):
            try:
                height, width = self.source.size(index)
            except ImageError as error:
                raise ValueError(f"{error}; leave it out with data.train.exclude") from error
            if min(height, width) < self.crop:
                raise ValueError(
                    f"{self.source.name(index)} is {width} x {height}, smaller than the crop of "
                    f"{self.crop}: set data.resize, or lower data.crop"
                )

    def _prepare(self, image: Tensor, epoch: int, index: int) -> Tensor:
        if self.resize is not None:
            image = resize_short_side(image, self.resize)
        if not self.training:
            return to_float(center_crop(image, self.crop))
        generator = generator_for("augment", self.seed, epoch, index)
        image = random_crop(image, self.crop, generator)
        if self.flip:
            image = random_flip(image, generator)
        if self.recolor:
            image = random_recolor(image, generator)
        return to_float(image)
