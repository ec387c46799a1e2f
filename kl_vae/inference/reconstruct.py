"""Encode and decode images of any size.

C channels, H and W the image's height and width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_vae.data import (
    MAX_PIXELS,
    ImageError,
    center_crop,
    display_name,
    read_image,
    resize_short_side,
    to_float,
)
from kl_vae.device import PRECISIONS, autocast
from kl_vae.inference.metrics import psnr, ssim
from kl_vae.inference.picture_files import as_saved
from kl_vae.model import AutoEncoderKL
from kl_vae.randomness import generator_for


@dataclass(frozen=True)
class ReconstructConfig:
    """How images are reconstructed.

    Attributes:
        resize: short side that images are resized to first, in pixels; None: as they are.
        crop: side of the square that is then cut out of the middle; None: the whole image.
        mode: decode the posterior's mode, or a sample of it.
        seed: of the samples; each also depends on its image's name.
        precision: fp32, bf16 or fp16.
        max_pixels: larger images are refused before they are decoded.
    """

    resize: int | None = None
    crop: int | None = None
    mode: Literal["mode", "sample"] = "mode"
    seed: int = 0
    precision: str = "fp32"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for key in ("resize", "crop"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: give at least 1 pixel, or None")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels={self.max_pixels}: give at least 1")
        if self.mode not in ("mode", "sample"):
            raise ValueError(f"mode={self.mode!r}: give mode or sample")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: give one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Reconstruction:
    """An image and its reconstruction, [C, H, W], as `as_saved` gives them, and its figures."""

    image: Tensor
    reconstruction: Tensor
    psnr: float  # dB; inf where both are the same
    ssim: float  # NaN where a side is below 11


@torch.inference_mode()
def reconstruct(
    model: AutoEncoderKL,
    image: Tensor,
    precision: str = "fp32",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Reconstruct one image [C, H, W] in [-1, 1] of any size; the result is like it, on the CPU.

    Its edge is repeated to the right and below up to a multiple of f, at least 2 f, and what that
    adds is cut off again.

    Args:
        model: in eval mode.
        image: on any device.
        precision: fp32, bf16 or fp16.
        generator: decode a sample of the posterior, drawn with it; None: decode the mode.

    Raises:
        ValueError: the result is not finite, or the memory does not suffice.
    """
    height, width = image.shape[1:]
    f = model.downsampling_factor
    device = next(model.parameters()).device
    # at least 2 f, since the group norm of a single latent is an error or a constant; repeated,
    # since reflection needs an image larger than what it adds
    right, below = (max(2 * f - side, -side % f) for side in (width, height))
    padded = F.pad(image[None], (0, right, 0, below), mode="replicate")
    try:
        with autocast(device, precision):
            posterior = model.encode(padded.to(device))
            z = posterior.mode() if generator is None else posterior.sample(generator)
            decoded = model.decode(z)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise ValueError(
            f"{width} x {height} pixels do not fit into the memory of {device}; "
            "resize or crop, or leave it out"
        ) from None
    decoded = decoded[0, :, :height, :width].float().cpu()
    if not decoded.isfinite().all():
        raise ValueError(
            f"the reconstruction in {precision} has NaN or infinity; try another precision"
        )
    return decoded.clamp(-1.0, 1.0)


def reconstruct_file(
    model: AutoEncoderKL, path: Path, config: ReconstructConfig, name: str
) -> Reconstruction:
    """Read, resize, crop and reconstruct one file, and measure the result as it will be saved.

    Args:
        model: in eval mode.
        path: the image file.
        config: how.
        name: with the seed, what the noise of mode=sample depends on.

    Raises:
        ImageError: the file cannot be read or reconstructed.
    """
    image = read_image(path, model.config.in_channels, config.max_pixels)
    try:
        x = to_float(_resized_and_cropped(image, config))
        sampled = config.mode == "sample"
        generator = generator_for("reconstruct", config.seed, name) if sampled else None
        decoded = reconstruct(model, x, config.precision, generator)
    except ValueError as error:
        raise ImageError(f"{display_name(path)}: {error}") from error
    before, after = as_saved(x), as_saved(decoded)
    data_range = (0.0, 255.0 if after.dtype == torch.uint8 else 1.0)
    return Reconstruction(
        image=before,
        reconstruction=after,
        psnr=psnr(before[None], after[None], data_range).item(),
        ssim=ssim(before[None], after[None], data_range).item(),
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    # only CUDA's has a type of its own
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        "out of memory" in text or "allocate memory" in text or "not enough memory" in text
    )


def _resized_and_cropped(image: Tensor, config: ReconstructConfig) -> Tensor:
    if config.resize is not None:
        image = resize_short_side(image, config.resize)
    if config.crop is None:
        return image
    height, width = image.shape[1:]
    if min(height, width) < config.crop:
        raise ValueError(f"{width} x {height} is smaller than the crop of {config.crop}; resize it")
    return center_crop(image, config.crop)
