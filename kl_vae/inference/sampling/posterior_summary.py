"""What the decoded samples of images' posteriors say together.

z latent channels, C channels, H and W the image's height and width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kl_vae.data import Source, read_image
from kl_vae.inference.sampling.canvas import GRID, GRID_CELLS, Canvas
from kl_vae.inference.sampling.heat_map import gain_for, heat_map
from kl_vae.inference.sampling.spread import Spread, save_array
from kl_vae.runtime.files import display_name
from kl_vae.runtime.outputs import replace_file
from kl_vae.visual.grid import save_png

STATISTICS = "posterior.json"
GRID_SAMPLES = 8  # of an image, at most
WITHIN = 0.999  # of the pixels of each heat map lie within its colours


@dataclass(frozen=True)
class PosteriorFiles:
    """The names of an image's files, by its number.

    Attributes:
        suffix: of the pictures.
        number: of samples of each image.
    """

    suffix: str
    number: int

    def original(self, image: int) -> str:
        """The image itself."""
        return f"image_{image:05d}_original{self.suffix}"

    def decoded(self, image: int) -> list[str]:
        """Of the mode, then of the samples."""
        samples = (f"image_{image:05d}_sample_{k:05d}{self.suffix}" for k in range(self.number))
        return [f"image_{image:05d}_mode{self.suffix}", *samples]

    def deviation(self, image: int) -> str:
        """The samples' standard deviation: float32 [H, W, C], of values from -1 to 1."""
        return f"image_{image:05d}_std.npy"

    def heat_map(self, image: int) -> str:
        """The same as a picture."""
        return f"image_{image:05d}_std.png"

    def all_of(self, image: int) -> list[str]:
        """All of them."""
        pictures = [self.original(image), *self.decoded(image)]
        return [*pictures, self.deviation(image), self.heat_map(image)]


class PosteriorSummary:
    """Writes deviations, their heat maps, posterior.json and grid.png.

    Args:
        canvas: where they go, and the pictures are.
        files: their names.
        source: of the images.
    """

    def __init__(self, canvas: Canvas, files: PosteriorFiles, source: Source) -> None:
        self._canvas = canvas
        self._files = files
        self._source = source

    def write(
        self, records: Sequence[Mapping[str, Any]], spread: Callable[[int], Spread]
    ) -> list[str]:
        """Write all.

        Args:
            records: of each image `skipped`, or `mean`, `smallest` and `largest` standard deviation
                of each channel of its posterior; one image at least is not skipped.
            spread: that of all samples of an image.

        Returns:
            A table of the posteriors' std, and what there is.

        Raises:
            ValueError: a file cannot be written.
        """
        usable = [image for image, record in enumerate(records) if "skipped" not in record]
        out, files = self._canvas.out, self._files
        for image in usable:
            # [H, W, C], as images in `.npy` files
            save_array(out / files.deviation(image), spread(image).std.float().permute(1, 2, 0))
        # one gain, so that images can be compared
        gain = gain_for(max(self._brightest(image) for image in usable))
        for image in usable:
            save_png(out / files.heat_map(image), heat_map(self._deviation(image) * gain))
        self._write_grid(usable)
        self._write_statistics({image: records[image] for image in usable}, gain)
        images = "1 image" if len(usable) == 1 else f"each of {len(usable)} images"
        return [
            *_table([records[image] for image in usable]),
            f"{files.number} samples of the posterior of {images} in {display_name(out)} "
            f"({GRID}: original, mode, {min(files.number, GRID_SAMPLES)} samples, and the "
            f"standard deviation of all, in values from -1 to 1, times {gain:g})",
        ]

    def _deviation(self, image: int) -> Tensor:
        """The root of the channels' mean variance, [H, W]."""
        std = np.load(self._canvas.out / self._files.deviation(image), allow_pickle=False)
        return torch.from_numpy(std).square().mean(2).sqrt()

    def _brightest(self, image: int) -> float:
        return float(np.quantile(self._deviation(image).numpy(), WITHIN))

    def _write_grid(self, images: Sequence[int]) -> None:
        canvas, files = self._canvas, self._files
        samples = min(files.number, GRID_SAMPLES)
        columns = 3 + samples
        cells = []
        for image in images[: max(1, GRID_CELLS // columns)]:
            names = [files.original(image), *files.decoded(image)[: 1 + samples]]
            cells += [canvas.picture(name) for name in names]
            cells.append(read_image(canvas.out / files.heat_map(image), 3))
        canvas.save_grid(cells, columns)

    def _write_statistics(self, of_images: Mapping[int, Mapping[str, Any]], gain: float) -> None:
        images = []
        for image, record in of_images.items():
            deviation = self._deviation(image).double().square().mean().sqrt().item()
            images.append(
                {
                    "image": self._source.name(image),
                    "files": f"image_{image:05d}_*",
                    "posterior_std": dict(record),
                    "picture_std": deviation,
                }
            )
        text = json.dumps({"heat_map_gain": gain, "images": images}, indent=1) + "\n"
        replace_file(self._canvas.out / STATISTICS, text.encode())


def _table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each channel's posterior std over all positions of all images, in lines."""
    lines = [f"channel {'mean std':>10} {'smallest':>10} {'largest':>10}"]
    for channel in range(len(records[0]["mean"])):
        mean = sum(record["mean"][channel] for record in records) / len(records)
        smallest = min(record["smallest"][channel] for record in records)
        largest = max(record["largest"][channel] for record in records)
        lines.append(f"{channel:>7} {mean:>10.4g} {smallest:>10.4g} {largest:>10.4g}")
    return lines
