"""Whole, in exact strips, or in blended tiles: which, by the memory that each takes.

B batch, C channels, H and W the image's height and width, h = H/f, w = W/f, z latent channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kl_vae.ddconfig import DDConfig, check_context, check_images, check_latents
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.tiling.blend import check_tiles, decode_blended, encode_blended
from kl_vae.inference.tiling.exact import check_exact, decode_exact, encode_exact
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.memory import free_memory, is_out_of_memory

logger = logging.getLogger(__name__)

Mode = Literal["auto", "whole", "exact", "blend"]
MODES = ("auto", "whole", "exact", "blend")

# of what is free: an estimate may be wrong, and other processes take more
WHOLE_FRACTION = 0.6
EXACT_FRACTION = 0.8
# B H W beyond which `auto` takes strips anyway
WHOLE_PIXELS = 2048 * 2048

# measured on the CPU, torch 2.15, kl-f8: what is held beside the maps counted here are kernels'
# reordered inputs, and strips between what the allocator could not give back
WHOLE_FACTOR = 4.5
EXACT_FACTOR = 1.4
FIXED_BYTES = 256 * 2**20

# the reason, once it has been given: a folder may hold many such images
warned_of_blending: list[str] = []


@dataclass(frozen=True)
class Tiling:
    """How images are taken apart to fit into the memory.

    Attributes:
        mode: whole; exact: in strips, with the result of the whole; blend: in overlapping tiles,
            which takes least memory and changes colours slightly; auto: the first of these whose
            memory there is.
        tile: side of a tile in pixels, for blend; a multiple of f.
        overlap: pixels that neighbouring tiles share at least, for blend; a multiple of f.

    Raises:
        ValueError: an unknown mode, or tiles that do not advance.
    """

    mode: Mode = "auto"
    tile: int = 512
    overlap: int = 128

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: give one of {', '.join(MODES)}")
        if self.tile < 1:
            raise ValueError(f"tile={self.tile}: give at least 1 pixel")
        if not 0 <= self.overlap < self.tile:
            raise ValueError(
                f"overlap={self.overlap}: give at least 0 and less than tile={self.tile}"
            )


def check_tiling(model: AutoEncoderKL, tiling: Tiling) -> None:
    """Check beforehand what the functions below would refuse of any image.

    Raises:
        ValueError: the mode does not suit the model, or f does not divide the tiles.
    """
    if tiling.mode == "exact":
        check_exact(model)
    if tiling.mode in ("auto", "blend"):
        check_tiles(tiling.tile, tiling.overlap, model.downsampling_factor)


@torch.no_grad()
def encode_tiled(
    model: AutoEncoderKL, images: Tensor, tiling: Tiling, *, may_blend: bool = True
) -> DiagonalGaussianDistribution:
    """Images [B, C, H, W] -> the posterior over latents [B, z, h, w]; there are no gradients.

    Args:
        model: the autoencoder.
        images: H and W are multiples of f.
        tiling: how they are taken apart.
        may_blend: whether `auto` may blend; otherwise it is out of memory instead, which a batch
            wants whose images are tried one by one then.

    Raises:
        ValueError: what `AutoEncoderKL.encode` refuses, a model with a context, or one that the
            mode does not suit.
    """
    check_images(images, model.config)
    check_context(None, model.config)
    moments = _run(
        {
            "whole": lambda: model.encode(images).parameters,
            "exact": lambda: encode_exact(model, images),
            "blend": lambda: encode_blended(model, images, tiling.tile, tiling.overlap),
        },
        _candidates(model, images, tiling, may_blend, decoding=False),
    )
    return DiagonalGaussianDistribution(moments)


@torch.no_grad()
def decode_tiled(
    model: AutoEncoderKL, z: Tensor, tiling: Tiling, *, may_blend: bool = True
) -> Tensor:
    """Latents [B, z, h, w] -> images [B, C, H, W], unclamped; there are no gradients.

    The arguments are those of `encode_tiled`.

    Raises:
        ValueError: what `AutoEncoderKL.decode` refuses, a model with a context, or one that the
            mode does not suit.
    """
    check_latents(z, model.latent_channels)
    check_context(None, model.config)
    return _run(
        {
            "whole": lambda: model.decode(z),
            "exact": lambda: decode_exact(model, z),
            "blend": lambda: decode_blended(model, z, tiling.tile, tiling.overlap),
        },
        _candidates(model, z, tiling, may_blend, decoding=True),
    )


@dataclass(frozen=True)
class Work:
    """The memory that one call of encoder or decoder takes.

    The highest resolutions decide: a feature map of c channels takes 4 B c H W bytes in float32 at
    full resolution, and a quarter of that one level below.

    Attributes:
        config: the architecture.
        decoding: decoder, else encoder.
        batch: B.
        height: H of the images, in pixels.
        width: W of the images, in pixels.
        itemsize: bytes of a number of the maps that are kept.
        scores: whether attention writes down the score of each pair of positions.
    """

    config: DDConfig
    decoding: bool
    batch: int
    height: int
    width: int
    itemsize: int = 4
    scores: bool = False

    @property
    def whole_bytes(self) -> int:
        """Bytes that the whole image takes beside weights, input and output."""
        largest = max(max(channels) * positions for channels, positions in self._levels())
        scores = 0
        if self.scores and self.config.attention == "vanilla":
            levels = len(self.config.ch_mult)
            attended = [x for x in range(levels) if self.config.has_attention(x)] + [levels - 1]
            scores = 2 * self.batch * self._positions(min(attended)) ** 2
        # norms are float32 in any precision
        return int(WHOLE_FACTOR * 4 * self.batch * largest + 4 * scores) + FIXED_BYTES

    @property
    def exact_bytes(self) -> int:
        """Bytes that the same takes in strips: the input of a residual block, or two maps of it."""
        largest = max(max(into, 2 * out) * positions for (into, out), positions in self._levels())
        return int(EXACT_FACTOR * self.itemsize * self.batch * largest) + FIXED_BYTES

    def _levels(self) -> list[tuple[tuple[int, int], int]]:
        """Channels into and out of the blocks of each level, and its positions in one image."""
        channels = self.config.channels
        before = (self.config.ch, *channels[:-1])
        after = (*channels[1:], channels[-1])
        return [
            ((incoming, outgoing), self._positions(level))
            for level, (incoming, outgoing) in enumerate(
                zip(after if self.decoding else before, channels, strict=True)
            )
        ]

    def _positions(self, level: int) -> int:
        return (self.height >> level) * (self.width >> level)


def choose(work: Work, free: int | None, can_be_exact: bool) -> list[Mode]:
    """The modes to try in order.

    `free` is the number of bytes that the device has left; None: decide by the size alone.
    """
    small = work.batch * work.height * work.width <= WHOLE_PIXELS
    whole = free is None or work.whole_bytes <= WHOLE_FRACTION * free
    if not can_be_exact:
        return ["whole", "blend"] if whole else ["blend"]
    if whole and small:
        return ["whole", "exact", "blend"]
    exact = free is None or work.exact_bytes <= EXACT_FRACTION * free
    return ["exact", "blend"] if exact else ["blend"]


def _candidates(
    model: AutoEncoderKL, x: Tensor, tiling: Tiling, may_blend: bool, decoding: bool
) -> list[Mode]:
    if tiling.mode != "auto":
        return [tiling.mode]
    f = model.downsampling_factor if decoding else 1
    autocast = torch.is_autocast_enabled(x.device.type)
    work = Work(
        model.config,
        decoding,
        batch=x.shape[0],
        height=f * x.shape[2],
        width=f * x.shape[3],
        itemsize=2 if autocast else x.element_size(),
        scores=x.device.type == "mps",
    )
    try:
        check_exact(model)
        can_be_exact = True
    except ValueError:
        can_be_exact = False
    modes = choose(work, free_memory(x.device), can_be_exact)
    if not may_blend:
        modes.remove("blend")
        if not modes:
            raise torch.OutOfMemoryError("out of memory, as far as is known before")
    if modes == ["blend"]:
        needed = work.exact_bytes if can_be_exact else work.whole_bytes
        _warn_of_blending(f"about {needed / 2**30:.1f} GiB are needed for the exact result")
    return modes


def _run(variants: dict[str, Callable[[], Tensor]], modes: list[Mode]) -> Tensor:
    for mode, following in zip(modes[:-1], modes[1:], strict=True):
        try:
            return variants[mode]()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # beyond the except clause: the error holds what was computed
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if following == "blend":
            _warn_of_blending("the memory did not suffice for the exact result")
    return variants[modes[-1]]()


def _warn_of_blending(reason: str) -> None:
    if not warned_of_blending:
        warned_of_blending.append(reason)
        logger.warning(
            "%s; such images are taken in blended tiles, and their colours may differ slightly: "
            "free memory, take fewer or smaller images at a time, or a lower precision",
            reason,
        )
