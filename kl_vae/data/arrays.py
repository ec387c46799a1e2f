"""Read a `.npy` file as an image; errors are ValueError without the path."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def array_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of an array of [H,W] or [H,W,C]."""
    height, width = _open_array(path).shape[:2]
    return height, width


def read_array(path: Path, channels: int) -> Tensor:
    """Return [C,H,W]: uint8 as stored; uint16 and floats as float32 in [0, 1]."""
    stored = _open_array(path)  # [H,W] or [H,W,C]
    array = stored[:, :, None] if stored.ndim == 2 else stored
    if array.shape[2] != channels:
        raise ValueError(
            f"the array's shape is {stored.shape}; {channels} channels need "
            f"[height, width, {channels}]{' or [height, width]' if channels == 1 else ''}"
        )
    native = array.dtype.newbyteorder("=")  # torch knows no other
    image = np.array(array.transpose(2, 0, 1), dtype=native, order="C")  # [C,H,W], in memory
    if image.dtype == np.uint8:
        return torch.from_numpy(image)
    if image.dtype == np.uint16:
        return torch.from_numpy(image.astype(np.float32) / 65535)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"the array is {image.dtype}: save uint8, uint16, or floats in [0, 1]")
    if not np.isfinite(image).all():
        raise ValueError("the array holds NaN or infinity: save floats in [0, 1]")
    low, high = image.min(), image.max()
    if low < 0 or high > 1:
        raise ValueError(
            f"the array's values are from {low:g} to {high:g}: scale them to [0, 1] and save again"
        )
    return torch.from_numpy(image.astype(np.float32))


def _open_array(path: Path) -> np.memmap:
    # mapped: the header is checked, pickles are refused, and no pixel is read yet
    array = np.lib.format.open_memmap(path, mode="r")
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"the array's shape is {array.shape}: save [height, width] or [height, width, channels]"
        )
    return array
