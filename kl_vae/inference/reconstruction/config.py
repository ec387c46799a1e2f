"""How a data set is reconstructed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kl_vae.data import MAX_PIXELS
from kl_vae.inference.tiling import Tiling
from kl_vae.runtime.device import PRECISIONS


@dataclass(frozen=True)
class ReconstructConfig:
    """How images are reconstructed.

    Attributes:
        resize: short side that images are resized to first, in pixels; None: as they are.
        crop: side of the square that is then cut out of the middle; None: the whole image.
        mode: decode the posterior's mode, or a sample of it.
        seed: of the samples; each also depends on its image's name.
        precision: fp32, bf16 or fp16; where that gives NaN or infinity an image is redone in fp32.
        max_pixels: larger images are refused before they are decoded.
        batch_size: images of one size that are reconstructed at once, at most.
        tiling: how images that are large for the memory are cut up.
    """

    resize: int | None = None
    crop: int | None = None
    mode: Literal["mode", "sample"] = "mode"
    seed: int = 0
    precision: str = "fp32"
    max_pixels: int = MAX_PIXELS
    batch_size: int = 8
    tiling: Tiling = field(default_factory=Tiling)

    def __post_init__(self) -> None:
        for key in ("resize", "crop"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: give at least 1 pixel, or None")
        for key in ("max_pixels", "batch_size"):
            value = getattr(self, key)
            if value < 1:
                raise ValueError(f"{key}={value}: give at least 1")
        if self.mode not in ("mode", "sample"):
            raise ValueError(f"mode={self.mode!r}: give mode or sample")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: give one of {', '.join(PRECISIONS)}")
