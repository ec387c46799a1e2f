"""Images as files and as pictures to look at.

C channels, H and W the image's height and width.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kl_vae.data import to_float, to_uint8
from kl_vae.data.pil_modes import MODE_BY_CHANNELS
from kl_vae.inference.grid import save_png
from kl_vae.inference.outputs import replace_file


def as_saved(image: Tensor) -> Tensor:
    """[C, H, W] in [-1, 1] as files hold it: uint8 where C is 1, 3 or 4, else float32 in [0, 1]."""
    if image.shape[0] in MODE_BY_CHANNELS:
        return to_uint8(image)
    return (image.float().clamp(-1.0, 1.0) + 1.0) / 2.0


def as_picture(image: Tensor, to_rgb: Callable[[Tensor], Tensor]) -> Tensor:
    """What `as_saved` gives as uint8 [3, H, W]; `to_rgb` is the model's."""
    return to_uint8(to_rgb(to_float(image)[None])[0])


def image_suffix(channels: int) -> str:
    """Return the suffix of the files that `save_image` writes."""
    return ".png" if channels in MODE_BY_CHANNELS else ".npy"


def save_image(path: Path, image: Tensor) -> None:
    """Write what `as_saved` gives: a PNG, or a `.npy` of float32 [H, W, C] in [0, 1].

    Raises:
        ValueError: the file cannot be written.
    """
    if image.dtype == torch.uint8:
        save_png(path, image)
        return
    stream = BytesIO()
    np.save(stream, image.permute(1, 2, 0).contiguous().numpy())
    replace_file(path, stream.getvalue())
