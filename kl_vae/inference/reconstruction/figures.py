"""What is known of one reconstructed image: its size and how close the reconstruction is.

C channels, H and W the image's height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_vae.data import to_float
from kl_vae.metrics.similarity import psnr, ssim
from kl_vae.runtime.memory import is_out_of_memory

Perceptual = Callable[[Tensor, Tensor], Tensor]  # of x, y [B, 3, H, W] in [-1, 1], gives [B]

# float64 windows of larger images are the CPU's, which has more memory
_MEASURED_WHERE_THEY_ARE = 2**22  # pixels


@dataclass(frozen=True)
class Figures:
    """Of the image after resize and crop and its reconstruction, both as they are saved.

    Attributes:
        index: of the image in the source.
        width: in pixels.
        height: in pixels.
        psnr: in dB; None: both are the same.
        ssim: None where a side is below 11.
        lpips: None where it was not asked for, or the image is too small or too large for it.
        redone_in_fp32: the precision asked for gave NaN or infinity.
    """

    index: int
    width: int
    height: int
    psnr: float | None
    ssim: float | None
    lpips: float | None = None
    redone_in_fp32: bool = False


@torch.inference_mode()
def measure(
    index: int,
    image: Tensor,
    reconstruction: Tensor,
    perceptual: Perceptual | None = None,
    redone_in_fp32: bool = False,
) -> Figures:
    """Compare what `as_saved` gives of an image and of its reconstruction, each [C, H, W]."""
    height, width = image.shape[1:]
    x, y = image[None], reconstruction[None]
    if height * width > _MEASURED_WHERE_THEY_ARE:
        x, y = x.cpu(), y.cpu()
    data_range = (0.0, 255.0 if x.dtype == torch.uint8 else 1.0)
    return Figures(
        index,
        width,
        height,
        psnr=_finite(psnr(x, y, data_range)),
        ssim=_finite(ssim(x, y, data_range)),
        lpips=None if perceptual is None else _lpips(image, reconstruction, perceptual),
        redone_in_fp32=redone_in_fp32,
    )


def _lpips(image: Tensor, reconstruction: Tensor, perceptual: Perceptual) -> float | None:
    try:
        return _finite(perceptual(to_float(image[None]), to_float(reconstruction[None])))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
