"""Read a `.npy` file as an image; errors are ValueError without the path.

A file of its own is mapped; of a stream, which may be a part of a file, the array is copied.
"""

import os
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kl_vae.data.tiles import tiles


def array_size(file: Path | BinaryIO) -> tuple[int, int]:
    """Return (height, width) of an array of [H,W] or [H,W,C]."""
    shape = _open_array(file).shape if isinstance(file, Path) else _read_header(file)[0]
    return shape[0], shape[1]


def read_array(file: Path | BinaryIO, channels: int) -> Tensor:
    """Return [C,H,W]: uint8 as stored; uint16 and floats as float32 in [0, 1]."""
    stored = _open_array(file) if isinstance(file, Path) else _copy_array(file)  # [H,W] or [H,W,C]
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
    _check_shape(array.shape)
    return array


def _copy_array(stream: BinaryIO) -> np.ndarray:
    shape, fortran_order, dtype = _read_header(stream)
    content = stream.read(prod(shape) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")


def _read_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, fortran_order, dtype); the stream is then, and surely ends, behind it."""
    stream.seek(0)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"the array's format is {version}: save it with numpy.save")
    if dtype.hasobject:
        raise ValueError(f"the array is {dtype}: save uint8, uint16, or floats in [0, 1]")
    _check_shape(shape)
    start, needed = stream.tell(), prod(shape) * dtype.itemsize
    stored = stream.seek(0, os.SEEK_END) - start
    if stored < needed:
        raise ValueError(f"the array takes {needed} bytes, and there are {stored}: save it again")
    stream.seek(start)
    return shape, fortran_order, dtype


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(
            f"the array's shape is {shape}: save [height, width] or [height, width, channels]"
        )
