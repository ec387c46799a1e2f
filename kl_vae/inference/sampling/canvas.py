"""Latents to pictures in an output folder.

z latent channels, h and w the latents' height and width, C channels, H and W the image's height and
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kl_vae.data import read_image
from kl_vae.inference.coding import decode_latents
from kl_vae.inference.progress import Ledger, units_of
from kl_vae.inference.tiling import Tiling
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.files import display_name
from kl_vae.visual.grid import MAX_SIDE, image_grid, save_png
from kl_vae.visual.image_files import as_picture, as_saved, image_suffix, save_image

GRID = "grid.png"
GRID_CELLS = 64  # at most, but for a single row

_GRID_WIDTH = 8192  # in pixels, up to which many columns make cells smaller
_SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Canvas:
    """What all pictures of a command have in common.

    Attributes:
        model: decodes them, in eval mode.
        out: the output folder.
        size: the images' side in pixels.
        precision: fp32, bf16 or fp16; what is not finite is decoded again in fp32.
        tiling: how latents that are large for the memory are cut up.
    """

    model: AutoEncoderKL
    out: Path
    size: int
    precision: str = "fp32"
    tiling: Tiling = field(default_factory=Tiling)

    @property
    def suffix(self) -> str:
        """Of the pictures' files."""
        return image_suffix(self.model.config.out_ch)

    @property
    def latent_side(self) -> int:
        """The h and w of the latents."""
        return self.size // self.model.downsampling_factor

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Latents [z, h, w], as many as fit into the memory at once, as images [B, C, H, W]."""
        return decode_latents(self.model, torch.stack(list(latents)), self.precision, self.tiling)

    def save(self, name: str, image: Tensor) -> None:
        """Write an image [C, H, W] in [-1, 1]."""
        save_image(self.out / name, as_saved(image))

    def picture(self, name: str) -> Tensor:
        """What `save` wrote, as uint8 [3, H, W]."""
        model = self.model
        device = next(model.parameters()).device  # of what to_rgb may multiply with
        image = read_image(self.out / name, model.config.out_ch)
        return as_picture(image, lambda x: model.to_rgb(x.to(device)).cpu())

    def save_grid(self, pictures: Iterable[Tensor], columns: int) -> None:
        """Write pictures uint8 [3, H, W] row by row into grid.png."""
        side = min(MAX_SIDE, max(_SMALLEST_SIDE, _GRID_WIDTH // columns))
        save_png(self.out / GRID, image_grid(pictures, columns, side))


class Drawing(Protocol):
    """Pictures that are drawn in numbered units, each a function of the unit alone."""

    @property
    def names(self) -> list[str]:
        """The files that are written, without grid.png."""

    @property
    def sizes(self) -> list[int]:
        """The number of images of each unit."""

    def draw(self, units: Sequence[int], ledger: Ledger) -> Iterator[Any]:
        """Draw units, and yield each one's record when its files are written."""

    def finish(self, records: Sequence[Any], ledger: Ledger) -> list[str]:
        """Write grid.png, when all units are drawn; return the lines that are to be said."""


class Series:
    """Pictures of latents, one file each, and as many as there is room for in grid.png.

    Args:
        canvas: where they go.
        names: of the pictures, without suffix.
        latents: gives those of a picture, [z, h, w].
        batch_size: pictures that are decoded at once.
        columns: of grid.png.
        what: the pictures are, for what is said of them.
    """

    def __init__(
        self,
        canvas: Canvas,
        names: Sequence[str],
        latents: Callable[[int], Tensor],
        batch_size: int,
        columns: int,
        what: str,
    ) -> None:
        self._canvas = canvas
        self.names = [f"{name}{canvas.suffix}" for name in names]
        self._latents = latents
        self._units = units_of(len(names), batch_size)
        self._columns = columns
        self._what = what

    @property
    def sizes(self) -> list[int]:
        """The number of images of each unit."""
        return [len(unit) for unit in self._units]

    def draw(self, units: Sequence[int], ledger: Ledger) -> Iterator[None]:
        """Draw units; there is nothing to record of them."""
        for indices in map(self._units.__getitem__, units):
            images = self._canvas.decode([self._latents(i) for i in indices])
            for i, image in zip(indices, images, strict=True):
                self._canvas.save(self.names[i], image)
            yield None

    def finish(self, records: Sequence[None], ledger: Ledger) -> list[str]:
        """Write grid.png; return how many pictures there are."""
        room = max(1, GRID_CELLS // self._columns) * self._columns
        shown = self.names[:room]
        self._canvas.save_grid(map(self._canvas.picture, shown), self._columns)
        return [
            f"{len(self.names)} {self._what} in {display_name(self._canvas.out)} "
            f"({GRID} shows {len(shown)} of them)"
        ]
