"""Images as files and as pictures to look at.

C channels, H and W the image's height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kl_vae.data import to_float, to_uint8
from kl_vae.data.pixels import MODE_BY_CHANNELS
from kl_vae.runtime.outputs import replace_file

FORMATS = ("png", "webp", "jpg")
THUMBNAIL_SIDE = 128

_QUALITY = {"webp": 95, "jpg": 90}
_LONGEST_SIDE = {"webp": 16383, "jpg": 65500}  # in pixels
_LOSSLESS = 100  # quality of WebP


@dataclass(frozen=True)
class PictureFormat:
    """How pictures are written.

    Attributes:
        name: png, webp or jpg.
        quality: 1 to 100, of webp (None: 95; 100: lossless) and jpg (None: 90; with all its
            colours); png has none.
    """

    name: str = "png"
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ValueError(f"format={self.name!r}: give one of {', '.join(FORMATS)}")
        if self.quality is None:
            object.__setattr__(self, "quality", _QUALITY.get(self.name))
        elif self.name == "png":
            raise ValueError(f"quality={self.quality}: png loses nothing; give webp or jpg, too")
        elif not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality}: give a number from 1 to 100")

    def suffix(self, channels: int) -> str:
        """The suffix of files of C channels.

        Raises:
            ValueError: this format does not hold them.
        """
        if channels not in MODE_BY_CHANNELS:
            if self.name == "png":
                return ".npy"
            raise ValueError(
                f"format={self.name}: holds 1, 3 or 4 channels, and the model has {channels}; "
                "leave the format out, which gives .npy files"
            )
        if self.name == "jpg" and channels == 4:
            raise ValueError("format=jpg: holds no transparency; give png or webp")
        return f".{self.name}"

    def check_size(self, height: int, width: int) -> None:
        """Check that a file of this format can be so large.

        Raises:
            ValueError: it cannot.
        """
        most = _LONGEST_SIDE.get(self.name)
        if most is not None and max(height, width) > most:
            raise ValueError(
                f"{width} x {height}: a {self.name} has sides of up to {most} pixels; give png"
            )

    def options(self) -> dict[str, Any]:
        """The format's options for Pillow."""
        if self.name == "png":
            return {"format": "PNG"}
        if self.name == "jpg":
            # 4:4:4: the colours are as fine as the brightness
            return {"format": "JPEG", "quality": self.quality, "subsampling": 0}
        # exact: what is transparent keeps its colour
        if self.quality == _LOSSLESS:
            return {"format": "WEBP", "lossless": True, "exact": True}
        return {"format": "WEBP", "quality": self.quality, "exact": True}


PNG = PictureFormat()


def as_saved(image: Tensor) -> Tensor:
    """[C, H, W] in [-1, 1] as files hold it: uint8 where C is 1, 3 or 4, else float32 in [0, 1]."""
    if image.shape[0] in MODE_BY_CHANNELS:
        return to_uint8(image)
    return (image.float().clamp(-1.0, 1.0) + 1.0) / 2.0


def as_picture(image: Tensor, to_rgb: Callable[[Tensor], Tensor]) -> Tensor:
    """What `as_saved` gives as uint8 [3, H, W]; `to_rgb` is the model's."""
    return to_uint8(to_rgb(to_float(image)[None])[0])


def as_pictures(
    image: Tensor, reconstruction: Tensor, to_rgb: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`as_picture` of both; where `to_rgb` stretches values, to the range of both."""
    both = as_picture(torch.cat([image, reconstruction], 2), to_rgb)
    first, second = both.chunk(2, dim=2)
    return first, second


def image_suffix(channels: int) -> str:
    """Return the suffix of the files that `save_image` writes."""
    return PNG.suffix(channels)


def save_image(path: Path, image: Tensor, picture_format: PictureFormat = PNG) -> None:
    """Write what `as_saved` gives: a picture, or a `.npy` of float32 [H, W, C] in [0, 1].

    Raises:
        ValueError: the file cannot be written.
    """
    stream = BytesIO()
    if image.dtype == torch.uint8:
        _pillow(image).save(stream, **picture_format.options())
    else:
        np.save(stream, image.permute(1, 2, 0).contiguous().cpu().numpy())
    replace_file(path, stream.getvalue())


def save_thumbnail(path: Path, picture: Tensor) -> None:
    """Write uint8 [3, H, W] as a JPEG with sides of up to 128 pixels.

    Raises:
        ValueError: the file cannot be written.
    """
    thumbnail = _pillow(picture)
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    stream = BytesIO()
    thumbnail.save(stream, format="JPEG", quality=80)
    replace_file(path, stream.getvalue())


def _pillow(image: Tensor) -> Image.Image:
    """A Pillow image of uint8 [C, H, W] with C = 1, 3 or 4."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).contiguous().cpu().numpy())
