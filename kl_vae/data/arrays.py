"""Read a `.npy` file as an image; errors are ValueError without the path."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kl_vae.data.tiles import tiles


def array_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of an array of [H,W] or [H,W,C]."""
    height, width = _open_array(path).shape[:2]
    return height, width


def read_array(path: Path, channels: int) -> Tensor:
    """Return [C,H,W]: uint8 as stored; uint16 and floats as float32 in [0, 1]."""
    stored = _open_array(path)  # [H,W] or [H,W,C]
    array = stored[:, :, None] if stored.ndim == 2 else stored
    height, width, stored_channels = array.shape
    if stored_channels != channels:
        raise ValueError(
            f"the array's shape is {stored.shape}; {channels} channels need "
            f"[height, width, {channels}]{' or [height, width]' if channels == 1 else ''}"
        )
    dtype = array.dtype.newbyteorder("=")  # torch knows no other
    floating = np.issubdtype(dtype, np.floating)
    if not (floating or dtype in (np.uint8, np.uint16)):
        raise ValueError(f"the array is {dtype}: save uint8, uint16, or floats in [0, 1]")
    image = torch.empty(
        channels, height, width, dtype=torch.uint8 if dtype == np.uint8 else torch.float32
    )
    ranges = []
    for rows, columns in tiles(height, width):
        values = array[rows, columns].astype(dtype)  # [h,w,C]
        if floating:
            ranges.append((values.min(), values.max()))
        if dtype != np.uint8:
            values = values.astype(np.float32)
        image[:, rows, columns] = torch.from_numpy(values.transpose(2, 0, 1))
    if floating:
        _check_range(np.min(ranges), np.max(ranges))
    return image.div_(65535) if dtype == np.uint16 else image


def _check_range(low: np.floating, high: np.floating) -> None:
    if not (np.isfinite(low) and np.isfinite(high)):  # of NaN anywhere both are NaN
        raise ValueError("the array holds NaN or infinity: save floats in [0, 1]")
    if low < 0 or high > 1:
        raise ValueError(
            f"the array's values are from {low:g} to {high:g}: scale them to [0, 1] and save again"
        )


def _open_array(path: Path) -> np.memmap:
    # mapped: the header is checked, pickles are refused, and no pixel is read yet
    array = np.lib.format.open_memmap(path, mode="r")
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"the array's shape is {array.shape}: save [height, width] or [height, width, channels]"
        )
    return array
