"""A data set: the crop of an image that a key stands for.

Shapes: C channels; an image is [C,crop,crop].
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kl_vae.data.decoding import ImageError
from kl_vae.data.pixels import Wanted, to_float
from kl_vae.data.sampler import Key
from kl_vae.data.sources import Source
from kl_vae.data.transforms import (
    center_place,
    channels_inside,
    random_flip,
    random_place,
    random_recolor,
    resize_short_side,
)
from kl_vae.runtime.randomness import generator_for

# images that are tried in place of a bad one; where a few in a hundred are bad, one or two do
MAX_REPLACEMENTS = 100
# a JPEG is decoded to no less than so many times what it is then resized to, see `draft`: crops of
# photographs are 43 to 55 dB PSNR (median 48) from those of whole decoding, and with 1 from 35 on
DRAFT_MARGIN = 2
# headers that are read before a run: seconds on a disk, where those of a million take minutes
MAX_CHECKED = 10_000


class BadImage(NamedTuple):
    """A file that could not be used, and why."""

    name: str
    reason: str


class Sample(NamedTuple):
    """One image, or zeros where there is none, and the files that could not be used for it."""

    image: Tensor  # [C,crop,crop], uint8; float32 in [-1, 1] of sources that give floats
    position: int  # in the global batch (training) or in the validation set
    name: str  # of the file that the image is from; empty: there is no image
    bad: tuple[BadImage, ...]


class ImageDataset(Dataset[Sample]):
    """Crops of a source's images, each a function of (seed, epoch, index) alone.

    In training a crop is cut out at random, with `flip` mirrored half of the
    time and with `recolor` recoloured half of the time; otherwise it is
    the middle, and nothing is drawn. `resize` is the length that the short side
    is given first; None leaves images as they are. In training another image,
    drawn from (seed, epoch, index) as well, takes the place of a bad one.

    Images stay uint8, a quarter of what floats take on their way to the device, where `normalized`
    makes them floats. With `draft` JPEGs that are resized are decoded smaller, in training
    alone, and no smaller than DRAFT_MARGIN times `resize`.
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
        # a user's own source may take an index alone
        self._takes_wanted = "wanted" in signature(source.read).parameters

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
        chosen, bad = index, list[BadImage]()
        for attempt in range(1 + MAX_REPLACEMENTS * self.training):
            if attempt:
                chosen = self._replacement(epoch, index, attempt)
            name = self.source.name(chosen)
            try:
                image = self._prepare(chosen, epoch, index)
                return Sample(image, position, name, tuple(bad))
            except ValueError as error:  # ImageError, or one of the transforms, which know no names
                bad.append(BadImage(name, str(error).removeprefix(f"{name}: ")))
        blank = torch.zeros(self.source.channels, self.crop, self.crop, dtype=torch.uint8)
        return Sample(blank, position, "", tuple(bad))

    def check_sizes(self) -> None:
        """Read headers, where images are not resized, so that a crop too large is found at once.

        Of more than MAX_CHECKED images so many are read, at even distances. Those without a
        readable header, and small ones that are met later, are left to `__getitem__`.

        Raises:
            ValueError: the first image that is smaller than the crop.
        """
        if self.resize is not None:
            return
        number = min(len(self), MAX_CHECKED)
        for index in (i * len(self) // number for i in range(number)):
            try:
                height, width = self.source.size(index)
            except ImageError:
                continue
            if min(height, width) < self.crop:
                raise ValueError(
                    f"{self.source.name(index)} is {width} x {height}, smaller than the crop of "
                    f"{self.crop}: set data.resize, or lower data.crop"
                )

    def _replacement(self, epoch: int, index: int, attempt: int) -> int:
        generator = generator_for("replacement", self.seed, epoch, index, attempt)
        return int(torch.randint(len(self), (), generator=generator))

    def _prepare(self, chosen: int, epoch: int, index: int) -> Tensor:
        generator = generator_for("augment", self.seed, epoch, index)
        place = partial(random_place, size=self.crop, generator=generator)
        image = channels_inside(
            self._crop(chosen, place if self.training else partial(center_place, size=self.crop))
        )
        if self.training and self.flip:
            image = random_flip(image, generator)
        if self.training and self.recolor:
            image = random_recolor(image, generator)
        return image if image.dtype == torch.uint8 else to_float(image)

    def _crop(self, chosen: int, place: Callable[[int, int], tuple[slice, slice]]) -> Tensor:
        """Read an image and cut a square out of it; where it can be, no more of it is read."""
        if self.resize is None:
            if self._takes_wanted:
                return self.source.read(chosen, Wanted(region=place))
            return Wanted(region=place).cut(self.source.read(chosen))
        if self.draft and self.training and self._takes_wanted:
            image = self.source.read(chosen, Wanted(short_side=DRAFT_MARGIN * self.resize))
        else:
            image = self.source.read(chosen)
        return Wanted(region=place).cut(resize_short_side(image, self.resize))
