"""Reconstruct the images of a source in units, and write their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from kl_vae.data import Source
from kl_vae.inference.batches import Numbered, batches_of_a_size
from kl_vae.inference.images import LoadedImage
from kl_vae.inference.padding import latent_noise
from kl_vae.inference.reconstruction.background import Background
from kl_vae.inference.reconstruction.config import ReconstructConfig
from kl_vae.inference.reconstruction.figures import Figures, Perceptual, measure
from kl_vae.inference.reconstruction.output_files import OutputFiles
from kl_vae.inference.reconstruction.reconstruct import Reconstruction, reconstruct_batch
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.randomness import generator_for
from kl_vae.visual.image_files import (
    as_picture,
    as_pictures,
    as_saved,
    save_image,
    save_thumbnail,
)

_LARGEST_UNIT, _SMALLEST_UNIT = 64, 8
_UNITS = 64  # at least, of large sources: so many that ranks end at about the same time


def unit_size(number: int) -> int:
    """How many of `number` images make a unit: few where there are few, for the ranks to share."""
    return max(_SMALLEST_UNIT, min(_LARGEST_UNIT, number // _UNITS))


class Reconstructor:
    """Does units of images: what is written and returned depends on the unit's images alone.

    But for the device, and for how much memory it has free where that does not suffice.

    Args:
        model: in eval mode.
        source: of the images.
        files: where the pictures go.
        config: how images are reconstructed.
        perceptual: measures LPIPS, if it is to be measured.
        background: where pictures are compressed.
        notify: is told in one line of an image that is skipped or redone.
    """

    def __init__(
        self,
        model: AutoEncoderKL,
        source: Source,
        files: OutputFiles,
        config: ReconstructConfig,
        perceptual: Perceptual | None,
        background: Background,
        notify: Callable[[str], None],
    ) -> None:
        self._model = model
        self._source = source
        self._files = files
        self._config = config
        self._perceptual = perceptual
        self._background = background
        self._notify = notify

    def do(self, images: Iterable[LoadedImage]) -> dict[str, Any]:
        """Reconstruct a unit; when this returns its files are written.

        Returns:
            The unit's record: `images`, a dict of `Figures` each, and `skipped`, pairs of index and
            reason, both in the order of the indices.

        Raises:
            ValueError: a file cannot be written.
        """
        figures: list[Figures] = []
        skipped: list[tuple[int, str]] = []
        usable = self._usable(images, skipped)
        factor = self._model.downsampling_factor
        for batch in batches_of_a_size(usable, factor, self._config.batch_size):
            results = self._reconstruct(batch)
            for (index, image), result in zip(batch, results, strict=True):
                if result.image is None:
                    self._skip(index, result.reason, skipped)
                else:
                    figures.append(self._save(index, image, result.image, result.redone_in_fp32))
        self._background.finish()
        figures.sort(key=lambda of_image: of_image.index)
        return {"images": [asdict(of_image) for of_image in figures], "skipped": sorted(skipped)}

    def _usable(
        self, images: Iterable[LoadedImage], skipped: list[tuple[int, str]]
    ) -> Iterator[Numbered]:
        for loaded in images:
            if loaded.image is None:
                self._skip(loaded.index, loaded.reason, skipped)
                continue
            try:
                self._files.picture_format.check_size(*loaded.image.shape[1:])
            except ValueError as error:
                self._skip(loaded.index, str(error), skipped)
                continue
            yield loaded.index, loaded.image

    def _skip(self, index: int, reason: str, skipped: list[tuple[int, str]]) -> None:
        skipped.append((index, reason))
        self._notify(f"skipped {self._source.name(index)}: {reason}")

    def _reconstruct(self, batch: list[Numbered]) -> list[Reconstruction]:
        config = self._config
        noise = None
        if config.mode == "sample":
            noise = [self._noise(index, image) for index, image in batch]
        images = [image for _, image in batch]
        return reconstruct_batch(self._model, images, config.precision, noise, config.tiling)

    def _noise(self, index: int, image: Tensor) -> Tensor:
        generator = generator_for("reconstruct", self._config.seed, self._source.key(index))
        return latent_noise(self._model, image, generator)

    def _save(self, index: int, image: Tensor, decoded: Tensor, redone: bool) -> Figures:
        if redone:
            name = self._source.name(index)
            self._notify(f"{name}: NaN or infinity in {self._config.precision}; redone in fp32")
        before, after = as_saved(image), as_saved(decoded)
        figures = measure(index, before.to(after.device), after, self._perceptual, redone)
        self._background.do(partial(self._write, index, before, after.cpu()))
        return figures

    def _write(self, index: int, image: Tensor, reconstruction: Tensor) -> None:
        files = self._files
        save_image(files.out / files.pictures[index], reconstruction, files.picture_format)
        if not files.gallery:
            return
        original, picture = image, as_picture(image, self._model.to_rgb)
        if files.shown(index) != files.pictures[index]:  # arrays, which a page cannot show
            original, shown = as_pictures(image, reconstruction, self._model.to_rgb)
            picture = original
            save_image(files.out / files.shown(index), shown)
        save_image(files.out / files.original(index), original)
        save_thumbnail(files.out / files.thumbnail(index), picture)
