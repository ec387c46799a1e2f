"""From stored values to those that a model takes, and back; tensors of any shape."""

import torch
from torch import Tensor


def to_float(image: Tensor) -> Tensor:
    """Map uint8, or floats in [0, 1], to float32 in [-1, 1]: to the same bits on any device."""
    if image.dtype != torch.uint8:
        return image.float() * 2 - 1
    # by a tensor: CUDA multiplies by the reciprocal of a number, which rounds differently
    half = torch.full((), 127.5, dtype=torch.float32, device=image.device)
    return (image / half).sub_(1)


def normalized(images: Tensor) -> Tensor:
    """Return what a `Sample` or a `Batch` holds as float32 in [-1, 1], on the device it is on."""
    return to_float(images) if images.dtype == torch.uint8 else images


def to_uint8(image: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8, rounded; what lies outside is clamped."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
