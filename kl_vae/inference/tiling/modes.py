"""Choice between whole images, exact strips and blended tiles by their memory requirements.

Shapes: B batch, C channels, H and W image height and width, h = H/f, w = W/f, z latent channels.
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

# fraction of the free memory that may be used: estimates are imprecise, and other processes may
# allocate more
WHOLE_FRACTION = 0.6
EXACT_FRACTION = 0.8
# number of pixels B H W above which `auto` always uses strips
WHOLE_PIXELS = 2048 * 2048

# measured on the CPU with torch 2.15 and kl-f8; beyond the feature maps counted below, memory is
# used by reordered kernel inputs and by fragmentation between strips
WHOLE_FACTOR = 4.5
EXACT_FACTOR = 1.4
FIXED_BYTES = 256 * 2**20

# the reason, after the first warning: a folder may contain many such images
warned_of_blending: list[str] = []


@dataclass(frozen=True)
class Tiling:
    """Settings for processing images in parts that fit into memory.

    Attributes:
        mode: whole: no splitting; exact: strips, with the same result as whole; blend: overlapping
            tiles, which need the least memory and change colours slightly; auto: the first of
            these that fits into memory.
        tile: for blend, side of a tile in pixels; a multiple of f.
        overlap: for blend, minimum overlap of neighbouring tiles in pixels; a multiple of f.

    Raises:
        ValueError: the mode is unknown, or `overlap` is not less than `tile`.
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
    """Check that a model supports a tiling, before any image is read.

    Raises:
        ValueError: the mode does not support the model, or `tile` or `overlap` is not a multiple
            of f.
    """
    if tiling.mode == "exact":
        check_exact(model)
    if tiling.mode in ("auto", "blend"):
        check_tiles(tiling.tile, tiling.overlap, model.downsampling_factor)


@torch.no_grad()
def encode_tiled(
    model: AutoEncoderKL, images: Tensor, tiling: Tiling, *, may_blend: bool = True
) -> DiagonalGaussianDistribution:
    """Encode images [B, C, H, W] to the posterior over latents [B, z, h, w], without gradients.

    Args:
        model: the autoencoder.
        images: images whose H and W are multiples of f.
        tiling: how the images are split.
        may_blend: whether mode `auto` may use blended tiles. If false, it raises an out-of-memory
            error instead, so that the caller can retry with a smaller batch.

    Raises:
        ValueError: see `AutoEncoderKL.encode`; or the model needs a context or does not support
            the mode.
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
    """Decode latents [B, z, h, w] to unclamped images [B, C, H, W], without gradients.

    See `encode_tiled` for the arguments.

    Raises:
        ValueError: see `AutoEncoderKL.decode`; or the model needs a context or does not support
            the mode.
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
    """Estimate of the memory used by one call of the encoder or decoder.

    The highest resolutions dominate: in float32, a feature map of c channels takes 4 B c H W bytes
    at full resolution, and a quarter of that one level below.

    Attributes:
        config: the architecture.
        decoding: true for the decoder, false for the encoder.
        batch: B.
        height: H of the images, in pixels.
        width: W of the images, in pixels.
        itemsize: bytes per element of stored feature maps.
        scores: whether attention materialises its score matrix.
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
        """Bytes for processing the whole image, without weights, input and output."""
        largest = max(max(channels) * positions for channels, positions in self._levels())
        scores = 0
        if self.scores and self.config.attention == "vanilla":
            levels = len(self.config.ch_mult)
            attended = [x for x in range(levels) if self.config.has_attention(x)] + [levels - 1]
            scores = 2 * self.batch * self._positions(min(attended)) ** 2
        # norms are computed in float32 in every precision
        return int(WHOLE_FACTOR * 4 * self.batch * largest + 4 * scores) + FIXED_BYTES

    @property
    def exact_bytes(self) -> int:
        """Bytes for processing in strips: the input of a residual block, or two of its outputs."""
        largest = max(max(into, 2 * out) * positions for (into, out), positions in self._levels())
        return int(EXACT_FACTOR * self.itemsize * self.batch * largest) + FIXED_BYTES

    def _levels(self) -> list[tuple[tuple[int, int], int]]:
        """Return the input and output channels of each level, and its positions per image."""
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
    """Return the modes to try, in order.

    `free` is the free memory of the device in bytes; if None, only the image size decides.
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
            raise torch.OutOfMemoryError("estimated to be out of memory")
    if modes == ["blend"]:
        needed = work.exact_bytes if can_be_exact else work.whole_bytes
        _warn_about_blending(f"the exact result needs about {needed / 2**30:.1f} GiB of memory")
    return modes


def _run(variants: dict[str, Callable[[], Tensor]], modes: list[Mode]) -> Tensor:
    for mode, following in zip(modes[:-1], modes[1:], strict=True):
        try:
            return variants[mode]()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # outside the except clause, since the error keeps tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if following == "blend":
            _warn_about_blending("not enough memory for the exact result")
    return variants[modes[-1]]()


def _warn_about_blending(reason: str) -> None:
    if not warned_of_blending:
        warned_of_blending.append(reason)
        logger.warning(
            "%s; large images are processed in blended tiles, which may change colours slightly; "
            "to avoid this, free memory, or use a smaller batch, smaller images or half precision",
            reason,
        )
