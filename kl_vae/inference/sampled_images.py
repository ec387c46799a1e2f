"""Images decoded from latents of the prior, of interpolations and of posteriors.

Images are drawn in work units; the result of a unit depends only on the unit.

Shapes: B batch, z latent channels, h and w latent height and width, C channels, H and W image
height and width.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from kl_vae.data import Source, read_image
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.coding import decode_latents, encode_images
from kl_vae.inference.images import load_images
from kl_vae.inference.progress import units_of
from kl_vae.inference.tiling import Tiling
from kl_vae.metrics.moments import RunningMoments
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.outputs import replace_file
from kl_vae.runtime.randomness import normal_noise
from kl_vae.visual.grid import MAX_SIDE, image_grid, save_png
from kl_vae.visual.image_files import as_saved, for_display, image_suffix, write_image

logger = logging.getLogger(__name__)

Record = dict[str, Any]  # JSON record of a unit; `skipped` is the reason for a skipped image

GRID = "grid.png"
STATISTICS = "posterior.json"
_IDENTITY = "kl_vae.identity"  # keyword of a text chunk

_GRID_CELLS = 64  # maximum number of cells, except for a single row
_GRID_WIDTH = 8192  # maximum width in pixels; more columns have smaller cells
_SMALLEST_CELL = 32  # takes precedence over the maximum width
_GRID_SAMPLES = 8  # maximum number of samples per posterior
_SMALLEST_SINE = 1e-4  # sine of the angle between two vectors below which their plane is undefined


@dataclass(frozen=True)
class Canvas:
    """Decoder and writer of images.

    Attributes:
        model: the autoencoder, in eval mode.
        out: output folder.
        size: side of the images in pixels.
        precision: fp32, bf16 or fp16; non-finite images are decoded again in fp32.
        tiling: how large latents are split to fit into memory.
        batch_size: number of images decoded at once.
    """

    model: AutoEncoderKL
    out: Path
    size: int
    precision: str
    tiling: Tiling
    batch_size: int

    @property
    def suffix(self) -> str:
        """Suffix of the image files: .png, or .npy for channel counts that PNG does not support."""
        return image_suffix(self.model.config.out_ch)

    def encode(self, image: Tensor) -> DiagonalGaussianDistribution:
        """Encode an image [C, H, W] to a posterior of batch size 1."""
        return encode_images(self.model, image[None], self.precision, self.tiling)

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Decode up to `batch_size` latents, [z, h, w] each, to images [B, C, H, W]."""
        return decode_latents(self.model, torch.stack(list(latents)), self.precision, self.tiling)

    def save(self, file: str, image: Tensor) -> None:
        """Write an image [C, H, W] in [-1, 1]."""
        write_image(self.out / file, as_saved(image))

    def save_grid(self, files: Sequence[str], columns: int, identity: Mapping[str, Any]) -> int:
        """Write the first images of `files` to grid.png, and return their number.

        The file also contains the identity, for `read_grid_identity`.
        """
        shown = files[: max(1, _GRID_CELLS // columns) * columns]
        side = min(MAX_SIDE, max(_SMALLEST_CELL, _GRID_WIDTH // columns))
        grid = image_grid(map(self._read, shown), columns, side)
        save_png(self.out / GRID, grid, {_IDENTITY: json.dumps(identity)})
        return len(shown)

    def _read(self, file: str) -> Tensor:
        """Read an image written by `save` as RGB, uint8 [3, H, W]."""
        model = self.model
        device = next(model.parameters()).device  # `to_rgb` has weights
        image = read_image(self.out / file, model.config.out_ch)
        return for_display(image, lambda x: model.to_rgb(x.to(device)).cpu())


def read_grid_identity(path: Path) -> dict[str, Any] | None:
    """Return the identity in a grid.png: empty if it has none, None if there is no such file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(json.loads(image.info[_IDENTITY]))
    except FileNotFoundError:
        return None
    except (
        *(OSError, SyntaxError, ValueError, KeyError, TypeError, RecursionError),
        Image.DecompressionBombError,
    ):
        return {}


class SampledImages(Protocol):
    """Interface of images of one origin, drawn in numbered units.

    Attributes:
        units: image files of each unit.
        others: further output files, except grid.png.
        identity: settings that the images depend on, in addition to the common ones.
    """

    units: list[list[str]]
    others: list[str]
    identity: dict[str, Any]

    def draw(self, units: Sequence[int]) -> Iterator[Record]:
        """Draw units, and yield the record of each unit after its files are written."""

    def finish(self, records: Sequence[Record], identity: Mapping[str, Any]) -> int:
        """Write grid.png and `others` from the records of all units.

        Args:
            records: the records of all units.
            identity: the identity of the command, stored in grid.png.

        Returns:
            The number of images in grid.png.
        """


class LatentSeries:
    """Images decoded from numbered latents.

    Args:
        canvas: decodes and writes the images.
        names: file names of the images, without suffix.
        latents: returns the latents [z, h, w] of an image by its number.
        columns: number of columns of grid.png.
        identity: see `SampledImages`.
    """

    def __init__(
        self,
        canvas: Canvas,
        names: Sequence[str],
        latents: Callable[[int], Tensor],
        *,
        columns: int,
        identity: dict[str, Any],
    ) -> None:
        self._canvas = canvas
        self._latents = latents
        self._columns = columns
        self._numbers = units_of(len(names), canvas.batch_size)
        self._files = [name + canvas.suffix for name in names]
        self.units = [[self._files[i] for i in numbers] for numbers in self._numbers]
        self.others: list[str] = []
        self.identity = identity

    def draw(self, units: Sequence[int]) -> Iterator[Record]:
        """Draw units; their records are empty."""
        for unit in units:
            images = self._canvas.decode([self._latents(i) for i in self._numbers[unit]])
            for file, image in zip(self.units[unit], images, strict=True):
                self._canvas.save(file, image)
            yield {}

    def finish(self, records: Sequence[Record], identity: Mapping[str, Any]) -> int:
        """Write grid.png, and return the number of images in it."""
        return self._canvas.save_grid(self._files, self._columns, identity)


def prior_images(canvas: Canvas, number: int, seed: int) -> LatentSeries:
    """Draw `number` images from the prior N(0, I).

    Only the KL term ties the posteriors to the prior. An autoencoder with the small kl_weight used
    for latent diffusion is not a generative model: expect texture without objects, neither grey
    nor saturated.
    """
    columns = math.ceil(math.sqrt(min(number, _GRID_CELLS)))
    names = [f"sample_{i:05d}" for i in range(number)]

    def latents(i: int) -> Tensor:
        return prior_latents(canvas.model, canvas.size, seed, i)

    return LatentSeries(canvas, names, latents, columns=columns, identity={"number": number})


def prior_latents(model: AutoEncoderKL, size: int, seed: int, index: int) -> Tensor:
    """Draw the latents [z, h, w] of image `index` from N(0, I)."""
    side = size // model.downsampling_factor
    return normal_noise((model.latent_channels, side, side), "sample", seed, index)


def interpolated_images(
    canvas: Canvas, sources: Sequence[Source], *, steps: int, linear: bool
) -> LatentSeries:
    """Interpolate from each image to the next.

    Args:
        canvas: encodes, decodes and writes the images.
        sources: the first two images of each source are used, in order.
        steps: number of images per pair, both ends included.
        linear: use linear (`lerp`) instead of spherical interpolation (`slerp`).

    Raises:
        ValueError: fewer than 2 steps or images, or an image that cannot be used.
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: give at least 2; both end images are counted")
    ends: list[Tensor] = []  # posterior means, [z, h, w]
    for source in sources:
        indices = range(min(2, len(source)))
        for loaded in load_images(source, indices, resize=canvas.size, crop=canvas.size):
            if loaded.image is None:
                name = source.name(loaded.index)
                raise ValueError(f"{name}: {loaded.reason}; give another image to --images")
            ends.append(canvas.encode(loaded.image).mode()[0])
    if len(ends) < 2:
        raise ValueError(
            "--images: 1 image, but interpolation needs 2; give 2 or more images, or a folder"
        )
    interpolate = lerp if linear else slerp

    def latents(i: int) -> Tensor:
        pair, step = divmod(i, steps)
        return interpolate(ends[pair], ends[pair + 1], step / (steps - 1))

    pairs = range(len(ends) - 1)
    names = [f"pair_{pair:05d}_step_{step:05d}" for pair in pairs for step in range(steps)]
    fingerprints = [source.fingerprint for source in sources]
    identity = {"images": fingerprints, "steps": steps, "lerp": linear}
    return LatentSeries(canvas, names, latents, columns=steps, identity=identity)


def lerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Return (1 - fraction) start + fraction end."""
    return (1.0 - fraction) * start + fraction * end


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Interpolate spherically between two tensors of any shape.

    The direction is sin((1 - t) w) / sin(w) u + sin(t w) / sin(w) v for unit vectors u and v at an
    angle w (Shoemake 1985, "Animating rotation with quaternion curves"); the length is interpolated
    linearly. `lerp` shortens the vectors halfway, which makes images greyer; `slerp` does not.
    Vectors without a unique arc (zero, nearly parallel or opposite) are interpolated by `lerp`.
    """
    # float64 resolves nearly equal directions
    first, second = start.double(), end.double()
    lengths = first.norm(), second.norm()
    if min(lengths) == 0:
        return lerp(start, end, fraction)
    u, v = first / lengths[0], second / lengths[1]
    angle = (u * v).sum().clamp(-1.0, 1.0).acos()
    if angle.sin() < _SMALLEST_SINE:
        return lerp(start, end, fraction)
    direction = ((1.0 - fraction) * angle).sin() * u + (fraction * angle).sin() * v
    length = (1.0 - fraction) * lengths[0] + fraction * lengths[1]
    point: Tensor = length * direction / angle.sin()
    return point.to(start.dtype)


class PosteriorImages:
    """Images with the decoded mode and decoded samples of their posteriors; one unit per image.

    Args:
        canvas: encodes, decodes and writes the images.
        source: source of the images.
        number: number of samples per image.
        seed: random seed; each sample also depends on its own number and the number of its image.
        num_workers: number of processes that decode image files.

    Raises:
        ValueError: fewer than 2 samples.
    """

    def __init__(
        self, canvas: Canvas, source: Source, number: int, seed: int, num_workers: int
    ) -> None:
        if number < 2:
            raise ValueError(
                f"number={number}: too few samples for a standard deviation; give at least 2"
            )
        self._canvas = canvas
        self._source = source
        self._number = number
        self._seed = seed
        self._num_workers = num_workers
        # per image: the image itself, the decoded mode, then the decoded samples
        kinds = ["original", "mode", *(f"sample_{k:05d}" for k in range(number))]
        self.units = [
            [f"image_{image:05d}_{kind}{canvas.suffix}" for kind in kinds]
            for image in range(len(source))
        ]
        self.others = [STATISTICS]
        self.identity = {"number": number, "images": source.fingerprint, "unit": "image"}

    def draw(self, units: Sequence[int]) -> Iterator[Record]:
        """Draw units.

        Yields:
            For each image either `skipped`, the reason why it cannot be used; or `posterior_std`,
            the mean, smallest and largest standard deviation per latent channel, and
            `image_std`, the square root of the mean pixel variance of the decoded samples in
            [-1, 1].
        """
        size = self._canvas.size
        loading = load_images(
            self._source, units, resize=size, crop=size, num_workers=self._num_workers
        )
        with closing(loading) as images:
            for loaded in images:
                if loaded.image is None:
                    logger.warning("skipped %s: %s", self._source.name(loaded.index), loaded.reason)
                    yield {"skipped": loaded.reason}
                else:
                    yield self._draw_image(loaded.index, loaded.image)

    def finish(self, records: Sequence[Record], identity: Mapping[str, Any]) -> int:
        """Write posterior.json and grid.png.

        A row of the grid shows an image, its decoded mode and up to 8 samples.
        """
        usable = [image for image, record in enumerate(records) if "skipped" not in record]
        statistics = [
            {"image": self._source.name(i), "files": f"image_{i:05d}_*", **records[i]}
            for i in usable
        ]
        text = json.dumps({"images": statistics}, indent=1) + "\n"
        replace_file(self._canvas.out / STATISTICS, text.encode())
        columns = 2 + min(self._number, _GRID_SAMPLES)
        shown = [file for image in usable for file in self.units[image][:columns]]
        return self._canvas.save_grid(shown, columns, identity)

    def _draw_image(self, number: int, image: Tensor) -> Record:
        canvas, posterior = self._canvas, self._canvas.encode(image)
        original, *decoded_files = self.units[number]
        canvas.save(original, image)

        def latents(k: int) -> Tensor:
            if k == 0:
                return posterior.mode()[0]
            noise = normal_noise(posterior.mean.shape, "posterior", self._seed, number, k - 1)
            return posterior.sample(noise=noise)[0]

        pixels = RunningMoments.empty(canvas.model.config.out_ch, canvas.size, canvas.size)
        for part in units_of(1 + self._number, canvas.batch_size):
            decoded = canvas.decode([latents(k) for k in part])
            for k, x in zip(part, decoded, strict=True):
                canvas.save(decoded_files[k], x)
                if k > 0:
                    pixels = pixels.merge(RunningMoments.of(x[None]))
        std = posterior.std[0].double().flatten(1)  # [z, h * w]
        return {
            "posterior_std": {
                "mean": std.mean(1).tolist(),
                "smallest": std.amin(1).tolist(),
                "largest": std.amax(1).tolist(),
            },
            "image_std": pixels.variance(correction=1).mean().sqrt().item(),
        }
