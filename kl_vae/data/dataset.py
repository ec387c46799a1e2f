"""Dataset of image crops, indexed by (epoch, index, position) keys.

Shapes: C channels; an image is [C,H,W], the size of the crop.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kl_vae.data.pixels import Wanted, to_float
from kl_vae.data.sampler import Key
from kl_vae.data.sources import Source, StoredSource
from kl_vae.data.transforms import (
    Sides,
    center_place,
    channels_inside,
    height_and_width,
    random_flip,
    random_place,
    random_recolor,
    resize_short_side,
)
from kl_vae.runtime.randomness import generator_for

# maximum number of replacements tried for an unusable image; one or two are usually enough
MAX_REPLACEMENTS = 100
# with `draft`, the decoded short side of a JPEG is at least this multiple of `resize`. Compared
# with full decoding, the PSNR of photo crops is 43 to 55 dB (median 48); a factor of 1 gives 35 dB
# and more
DRAFT_MARGIN = 2


class BadImage(NamedTuple):
    """The name of an unusable file and the reason."""

    name: str
    reason: str


class Sample(NamedTuple):
    """One image crop and the unusable files met while reading it."""

    image: Tensor  # [C,H,W], uint8, or float32 in [-1, 1] for float sources; zeros if none
    position: int  # in the global batch (training) or in the validation set
    name: str  # of the image file; empty if no image could be read
    bad: tuple[BadImage, ...]


class ImageDataset(Dataset[Sample]):
    """Crops of a source's images, each determined by (seed, epoch, index).

    Images of uint8 sources stay uint8, which takes a quarter of the memory and bandwidth of float32
    on the way to the device. Convert them there with `normalized`.

    Args:
        source: the images.
        crop: side of the crop in pixels, or its (height, width).
        resize: short side in pixels before cropping; None: no resizing.
        flip: mirror a training crop with probability 0.5.
        seed: of the random crops and augmentations.
        training: take random crops, apply augmentations and replace unusable images by random
            ones; otherwise take center crops.
        recolor: apply `random_recolor` to training crops.
        draft: decode training JPEGs that are resized at a reduced size, with a short side of at
            least `DRAFT_MARGIN * resize`.
    """

    def __init__(
        self,
        source: Source,
        crop: Sides,
        resize: int | None,
        flip: bool,
        seed: int,
        training: bool,
        recolor: bool = False,
        draft: bool = False,
    ) -> None:
        self.source = source
        self.crop = crop
        self.resize = resize
        self.flip = flip
        self.seed = seed
        self.training = training
        self.recolor = recolor
        self.draft = draft
        # `read` of a custom source may have no such parameter
        self._takes_wanted = "wanted" in signature(source.read).parameters

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the crops in pixels."""
        return height_and_width(self.crop)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source: 32 hex digits that change with the images."""
        return self.source.fingerprint

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample of (epoch, index, position); file errors go to `Sample.bad`."""
        epoch, index, position = key
        chosen, bad = index, list[BadImage]()
        for attempt in range(1 + MAX_REPLACEMENTS * self.training):
            if attempt:
                chosen = self._replacement(epoch, index, attempt)
            name = self.source.name(chosen)
            try:
                image = self._prepare(chosen, epoch, index)
                return Sample(image, position, name, tuple(bad))
            except ValueError as error:  # ImageError, or an error of a transform without the name
                bad.append(BadImage(name, str(error).removeprefix(f"{name}: ")))
        blank = torch.zeros(self.source.channels, *self.crop_size, dtype=torch.uint8)
        return Sample(blank, position, "", tuple(bad))

    def keep(self, indices: NDArray[np.int64]) -> None:
        """Keep only the images at these indices; the source must have a `subset`."""
        if len(indices) < len(self):
            self.source = cast(StoredSource, self.source).subset(indices)

    def _replacement(self, epoch: int, index: int, attempt: int) -> int:
        generator = generator_for("replacement", self.seed, epoch, index, attempt)
        return int(torch.randint(len(self), (), generator=generator))

    def _prepare(self, chosen: int, epoch: int, index: int) -> Tensor:
        generator = generator_for("augment", self.seed, epoch, index)
        region = partial(random_place, size=self.crop, generator=generator)
        image = channels_inside(
            self._crop(chosen, region if self.training else partial(center_place, size=self.crop))
        )
        if self.training and self.flip:
            image = random_flip(image, generator)
        if self.training and self.recolor:
            image = random_recolor(image, generator)
        return image if image.dtype == torch.uint8 else to_float(image)

    def _crop(self, chosen: int, region: Callable[[int, int], tuple[slice, slice]]) -> Tensor:
        """Read and crop an image; convert only the cropped region if the source supports it."""
        if self.resize is None:
            if self._takes_wanted:
                return self.source.read(chosen, Wanted(region=region))
            return Wanted(region=region).cut(self.source.read(chosen))
        if self.draft and self.training and self._takes_wanted:
            image = self.source.read(chosen, Wanted(short_side=DRAFT_MARGIN * self.resize))
        else:
            image = self.source.read(chosen)
        return Wanted(region=region).cut(resize_short_side(image, self.resize))
