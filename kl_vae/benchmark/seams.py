"""What blended tiles change in a picture, against the whole of it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_vae.inference.tiling import Tiling, decode_tiled, encode_tiled
from kl_vae.model import AutoEncoderKL

logger = logging.getLogger(__name__)

BLOCK = 32  # pixels: the side of the areas whose mean colour is compared


@dataclass(frozen=True)
class Change:
    """How far reconstructions are from those made whole, in steps of 8 bits.

    Attributes:
        mean: of the absolute difference, over all pictures.
        largest: absolute difference of a value.
        colour: largest change of a channel's mean over a block of 32 x 32 pixels.
    """

    mean: float
    largest: float
    colour: float


@torch.inference_mode()
def compare_seams(
    model: AutoEncoderKL, images: Iterable[Tensor], tile: int, overlap: int
) -> dict[str, Change]:
    """Reconstruct pictures in each way, and compare with the whole reconstruction.

    Args:
        model: in eval mode.
        images: [C, H, W] in [-1, 1], H and W multiples of f and larger than `tile`.
        tile: side of the blended tiles, pixels.
        overlap: of neighbours, pixels; diffusers' is always a quarter of the tile. Its way is left
            out with a warning where it is not installed, or cannot express the model.
    """
    device = model.get_last_layer().device
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "exact": _ours(model, Tiling(mode="exact")),
            f"blend, tiles of {tile}, overlap {overlap}": _ours(
                model, Tiling(mode="blend", tile=tile, overlap=overlap)
            ),
        }
        try:
            theirs = _diffusers(model, Path(folder, "diffusers"), tile)
            ways[f"diffusers, tiles of {tile}, overlap {tile // 4}"] = theirs
        except (ImportError, ValueError) as error:
            logger.warning("without diffusers' tiles: %s", error)
        whole = _ours(model, Tiling(mode="whole"))
        changes: dict[str, list[Change]] = {name: [] for name in ways}
        for image in images:
            x = image[None].to(device)
            expected = whole(x)
            for name, way in ways.items():
                changes[name].append(_change(way(x), expected))
    return {
        name: Change(
            sum(c.mean for c in each) / len(each),
            max(c.largest for c in each),
            max(c.colour for c in each),
        )
        for name, each in changes.items()
    }


def table(changes: dict[str, Change]) -> str:
    """Markdown: a row a way."""
    rows = [
        f"| {name} | {c.mean:.2g} | {c.largest:.3g} | {c.colour:.2g} |"
        for name, c in changes.items()
    ]
    head = "| way | mean difference | largest | largest change of colour |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def _change(x: Tensor, expected: Tensor) -> Change:
    difference = (x.clamp(-1.0, 1.0) - expected.clamp(-1.0, 1.0)).float() * 127.5
    colour = F.avg_pool2d(difference, min(BLOCK, *x.shape[2:])).abs().max().item()
    return Change(difference.abs().mean().item(), difference.abs().max().item(), colour)


def _ours(model: AutoEncoderKL, tiling: Tiling) -> Callable[[Tensor], Tensor]:
    return lambda x: decode_tiled(model, encode_tiled(model, x, tiling).mode(), tiling)


def _diffusers(model: AutoEncoderKL, folder: Path, tile: int) -> Callable[[Tensor], Tensor]:
    from diffusers import AutoencoderKL

    model.save_pretrained(folder)
    theirs = (
        AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
        .to(model.get_last_layer().device)
        .eval()
    )
    theirs.enable_tiling()
    theirs.tile_sample_min_size = tile
    theirs.tile_latent_min_size = tile // model.downsampling_factor
    return lambda x: theirs.decode(theirs.encode(x).latent_dist.mode()).sample
