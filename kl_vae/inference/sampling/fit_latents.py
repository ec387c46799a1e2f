"""The latents that a Gaussian is fitted to: of images, or stored ones.

z latent channels, h and w the latents' height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kl_vae.data import LatentDataset, Source
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.coding import encode_images
from kl_vae.inference.encoding.latent_folder import weights_sha256
from kl_vae.inference.images import load_images
from kl_vae.latents import LatentNormalization
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.files import display_name
from kl_vae.runtime.randomness import generator_for

logger = logging.getLogger(__name__)


class Latents(NamedTuple):
    """Raw latents of some images, and what became of the others."""

    latents: Tensor | None  # [n, z, h, w], float32; None: no image can be used
    skipped: list[tuple[str, str]]  # name and reason


class LatentSource(Protocol):
    """Numbered latents of one size, samples of the posteriors; each is always the same sample."""

    @property
    def fingerprint(self) -> str:
        """32 hex digits that change when the latents do."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The z, h, w of each."""

    def __len__(self) -> int:
        """Return their number."""

    def read(self, units: Sequence[Sequence[int]]) -> Iterator[Latents]:
        """Yield the latents of each unit of indices."""


class StoredLatents:
    """Those of a folder that `kl-vae encode --out` has written.

    Args:
        dataset: of the folder.
        model: that is to decode them.
        checkpoint: its name, for errors.

    Raises:
        ValueError: the model has other latents.
    """

    def __init__(self, dataset: LatentDataset, model: AutoEncoderKL, checkpoint: str) -> None:
        settings = dataset.index.settings
        folder = display_name(dataset.folder)
        for what, theirs, ours in (
            ("channels", settings.channels, model.latent_channels),
            ("pixels a latent", settings.f, model.downsampling_factor),
        ):
            if theirs != ours:
                raise ValueError(
                    f"{folder}: latents of {theirs} {what}, and those of {checkpoint} have "
                    f"{ours}; give the checkpoint that they were encoded with "
                    f"({display_name(dataset.index.checkpoint)}), or encode the images again"
                )
        self._dataset = dataset
        self._checkpoint = checkpoint
        self._normalization: LatentNormalization | None = None
        if settings.normalized and settings.normalization is not None:
            self._normalization = LatentNormalization(**settings.normalization)
        side = settings.crop // settings.f
        self.shape = (settings.channels, side, side)

    def warn_of_other_weights(self, model: AutoEncoderKL) -> None:
        """Log a warning where the latents are not of this model's weights."""
        index = self._dataset.index
        if index.settings.weights != weights_sha256(model):
            logger.warning(
                "%s: encoded with other weights (%s) than those of %s, which may make nothing of "
                "them",
                *(display_name(self._dataset.folder), display_name(index.checkpoint)),
                self._checkpoint,
            )

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the folder's index, which has the sha256 of each file."""
        text = self._dataset.index.to_json()
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._dataset)

    def read(self, units: Sequence[Sequence[int]]) -> Iterator[Latents]:
        """Yield the latents of each unit of indices."""
        for unit in units:
            yield Latents(torch.stack([self._read(i) for i in unit]), [])

    def _read(self, index: int) -> Tensor:
        z = self._dataset[index].latents.float()[None]
        if self._dataset.index.settings.what == "moments":
            z = _sample(DiagonalGaussianDistribution(z), [index])
        # normalised moments are those of normalised latents
        return (z if self._normalization is None else self._normalization.denormalize(z))[0]


class EncodedImages:
    """Those of images, encoded when they are read.

    Args:
        model: in eval mode.
        source: of the images.
        size: the side that they are resized and cropped to, a multiple of f.
        precision: fp32, bf16 or fp16; what is not finite is encoded again in fp32.
        num_workers: processes that decode images.
    """

    def __init__(
        self, model: AutoEncoderKL, source: Source, size: int, precision: str, num_workers: int
    ) -> None:
        self._model = model
        self._source = source
        self._size = size
        self._precision = precision
        self._num_workers = num_workers
        side = size // model.downsampling_factor
        self.shape = (model.latent_channels, side, side)

    @property
    def fingerprint(self) -> str:
        """32 hex digits that change when the images do."""
        return self._source.fingerprint

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._source)

    def read(self, units: Sequence[Sequence[int]]) -> Iterator[Latents]:
        """Yield the latents of each unit of indices, which are encoded at once."""
        images = load_images(
            self._source,
            [index for unit in units for index in unit],
            resize=self._size,
            crop=self._size,
            num_workers=self._num_workers,
        )
        for unit in units:
            loaded = list(islice(images, len(unit)))
            usable = [(x.index, x.image) for x in loaded if x.image is not None]
            skipped = [(self._source.name(x.index), x.reason) for x in loaded if x.image is None]
            if not usable:
                yield Latents(None, skipped)
                continue
            batch = torch.stack([image for _, image in usable])
            posterior = encode_images(self._model, batch, self._precision)
            yield Latents(_sample(posterior, [index for index, _ in usable]), skipped)


def evenly_spaced(number: int, most: int) -> list[int]:
    """Of the indices 0 to `number` - 1 `most` at most, equally far apart."""
    chosen = min(number, most)
    return [i * number // chosen for i in range(chosen)]


def _sample(posterior: DiagonalGaussianDistribution, indices: Sequence[int]) -> Tensor:
    shape = posterior.mean.shape[1:]
    noise = [torch.randn(shape, generator=generator_for("fit", index)) for index in indices]
    return posterior.sample(noise=torch.stack(noise))
