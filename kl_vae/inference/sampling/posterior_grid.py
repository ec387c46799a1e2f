"""Images beside decoded samples of their posteriors.

z latent channels, h and w the latents' height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from kl_vae.data import Source
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.coding import encode_images
from kl_vae.inference.images import LoadedImage, load_images
from kl_vae.inference.progress import Ledger, units_of
from kl_vae.inference.sampling.canvas import Canvas
from kl_vae.inference.sampling.posterior_summary import STATISTICS, PosteriorFiles, PosteriorSummary
from kl_vae.inference.sampling.spread import Spread
from kl_vae.runtime.randomness import generator_for


class PosteriorGrid:
    """`number` decoded samples of the posterior of each image of a source.

    A unit is a part of an image's pictures, so that ranks share those of a single image, too.

    Args:
        canvas: where the pictures go.
        source: of the images.
        number: of samples of each image.
        seed: of the samples; each also depends on its image's place in the source, and its own.
        batch_size: pictures that are decoded at once.
        notify: is told in one line of an image that is skipped.

    Raises:
        ValueError: fewer than 2 samples.
    """

    def __init__(
        self,
        canvas: Canvas,
        source: Source,
        number: int,
        seed: int,
        batch_size: int,
        notify: Callable[[str], None],
    ) -> None:
        if number < 2:
            raise ValueError(f"number={number}: one sample has no deviation; give at least 2")
        self._canvas = canvas
        self._source = source
        self._seed = seed
        self._notify = notify
        self._files = PosteriorFiles(canvas.suffix, number)
        self._parts = units_of(number + 1, batch_size)  # of an image: its mode, then the samples

    @property
    def names(self) -> list[str]:
        """The files that are written, without grid.png."""
        images = range(len(self._source))
        return [STATISTICS, *(name for image in images for name in self._files.all_of(image))]

    @property
    def sizes(self) -> list[int]:
        """The number of pictures of each unit."""
        return [len(part) for part in self._parts] * len(self._source)

    def draw(self, units: Sequence[int], ledger: Ledger) -> Iterator[dict[str, Any]]:
        """Draw units.

        Yields:
            Why the image is skipped (`skipped`), or of an image's first part the `mean`, `smallest`
            and `largest` standard deviation of each channel's posterior.
        """
        last, loaded, posterior = -1, LoadedImage(-1, None, ""), None
        for unit in units:
            image, number = divmod(unit, len(self._parts))
            if image != last:
                last, (loaded, posterior) = image, self._encode(image)
            if loaded.image is None or posterior is None:
                if number == 0:
                    self._notify(f"skipped {self._source.name(image)}: {loaded.reason}")
                yield {"skipped": loaded.reason}
                continue
            if number == 0:
                self._canvas.save(self._files.original(image), loaded.image)
            decoded = self._draw_part(image, number, posterior)
            samples = decoded[1:] if number == 0 else decoded
            Spread.of(samples).save(ledger.path(unit, ".npy"))
            yield _of_channels(posterior.std[0]) if number == 0 else {}

    def finish(self, records: Sequence[dict[str, Any]], ledger: Ledger) -> list[str]:
        """Write what all samples say together and grid.png; see `PosteriorSummary`.

        Raises:
            ValueError: no image can be used and the ledger is closed; or a file cannot be written.
        """
        if all("skipped" in record for record in records):
            ledger.close()
            raise ValueError(
                f"none of the {len(self._source)} images can be used, for the reasons above; give "
                "others to --images"
            )
        summary = PosteriorSummary(self._canvas, self._files, self._source)
        samples = [len(part) - (0 in part) for part in self._parts]

        def spread(image: int) -> Spread:
            paths = (ledger.path(image * len(samples) + i, ".npy") for i in range(len(samples)))
            return Spread.join(map(Spread.load, paths, samples))

        return summary.write(records[:: len(samples)], spread)

    def _encode(self, image: int) -> tuple[LoadedImage, DiagonalGaussianDistribution | None]:
        canvas = self._canvas
        (loaded,) = load_images(self._source, [image], resize=canvas.size, crop=canvas.size)
        if loaded.image is None:
            return loaded, None
        x = loaded.image[None]
        return loaded, encode_images(canvas.model, x, canvas.precision, canvas.tiling)

    def _draw_part(
        self, image: int, number: int, posterior: DiagonalGaussianDistribution
    ) -> Tensor:
        """Draw and return the pictures of a part, [n, C, H, W]."""
        part = self._parts[number]
        decoded = self._canvas.decode([self._latents(image, k, posterior) for k in part])
        names = self._files.decoded(image)
        for k, picture in zip(part, decoded, strict=True):
            self._canvas.save(names[k], picture)
        return decoded

    def _latents(self, image: int, k: int, posterior: DiagonalGaussianDistribution) -> Tensor:
        """Of an image's picture k, [z, h, w]: the mode is picture 0."""
        if k == 0:
            return posterior.mode()[0]
        return posterior.sample(generator_for("posterior", self._seed, image, k - 1))[0]


def _of_channels(std: Tensor) -> dict[str, list[float]]:
    """What `draw` yields of a posterior's std [z, h, w]."""
    values = std.double().flatten(1)
    return {
        "mean": values.mean(1).tolist(),
        "smallest": values.amin(1).tolist(),
        "largest": values.amax(1).tolist(),
    }
