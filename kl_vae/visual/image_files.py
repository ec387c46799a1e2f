"""Images from and to files, PIL images and arrays, and as images to look at.

C channels, H and W the image's height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kl_vae.data import MAX_PIXELS, pil_to_tensor, read_image, to_float, to_uint8
from kl_vae.data.pixel_format import PixelFormat, parse_ranges
from kl_vae.data.pixels import MODE_BY_CHANNELS
from kl_vae.data.png import encode_16_bits
from kl_vae.runtime.outputs import replace_file

FORMATS = ("png", "webp", "jpg")
THUMBNAIL_SIDE = 128

_QUALITY = {"webp": 95, "jpg": 90}
_LONGEST_SIDE = {"webp": 16383, "jpg": 65500}  # in pixels
_LOSSLESS = 100  # quality of WebP


@dataclass(frozen=True)
class ImageFormat:
    """How images are written.

    Attributes:
        name: png, webp or jpg.
        quality: 1 to 100, of webp (None: 95; 100: lossless) and jpg (None: 90; with all its
            colours); png has none.
        bits: per channel; 16 only for png.
    """

    name: str = "png"
    quality: int | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (8, 16) or (self.bits == 16 and self.name != "png"):
            raise ValueError(f"bits={self.bits}: give 8, or 16 with format=png")
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


PNG = ImageFormat()


def load_image(
    source: str | Path | Image.Image | npt.NDArray[Any] | Tensor,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    value_range: tuple[float, float] | None = None,
) -> Tensor:
    """Load one image as a model takes it: [1, C, H, W], float32 in [-1, 1], on the CPU.

    Args:
        source: one of
            a path, read as `kl_vae.data.read_image` says: EXIF orientation applied, transparency on
            white unless C is 4;
            a PIL image, likewise;
            a numpy array [H, W, C], or [H, W] where C is 1: uint8, or floats in [0, 1];
            a uint8 tensor [C, H, W].
            Float tensors are refused, since their range is not known.
        channels: C; files and PIL images are converted, arrays and tensors must have it.
        max_pixels: larger files are refused before they are decoded.
        value_range: values of black and white in a file or PIL image, such as (0, 4095) for 12 bits
            stored in 16; None: the depth that the file states.

    Raises:
        ValueError: the file cannot be used, or another shape, type or range.
    """
    pixel_format = PixelFormat(parse_ranges(value_range))
    if isinstance(source, (str, Path)):
        image = read_image(source, channels, max_pixels, pixel_format=pixel_format)
    elif isinstance(source, Image.Image):
        turned = ImageOps.exif_transpose(source)
        image = pil_to_tensor(turned, channels, pixel_format=pixel_format)
    elif isinstance(source, np.ndarray):
        image = _from_array(source, channels)
    elif source.dtype == torch.uint8:
        image = source.cpu()
    else:
        raise ValueError(f"a tensor of {source.dtype} has no known range; give uint8 [C, H, W]")
    if image.ndim != 3 or image.shape[0] != channels or 0 in image.shape:
        raise ValueError(
            f"an image of shape {list(image.shape)}: give [{channels}, H, W] (an array: "
            f"[H, W, {channels}]), or its number of channels as channels"
        )
    return to_float(image)[None].contiguous()


def _from_array(array: npt.NDArray[Any], channels: int) -> Tensor:
    if array.ndim == 2 and channels == 1:
        array = array[:, :, None]
    if array.ndim != 3:
        raise ValueError(f"an array of shape {list(array.shape)}: give [H, W, {channels}]")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"an array of {array.dtype}: give uint8, or floats in [0, 1]")
        if array.size and not (array.min() >= 0 and array.max() <= 1):  # NaN fails as well
            raise ValueError(
                f"an array of values from {array.min():g} to {array.max():g}: give floats in "
                "[0, 1], or uint8"
            )
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def save_image(image: Tensor, path: str | Path, *, quality: int | None = None) -> None:
    """Write one image to a file; its folder is created, and a file that exists is replaced.

    Args:
        image: [C, H, W] or [1, C, H, W] in [-1, 1], which it is clamped to, with C = 1, 3 or 4.
        path: its suffix says the format: .png, .webp, .jpg (or .jpeg); or .npy, which holds float32
            [H, W, C] in [0, 1], of any C.
        quality: of webp (None: 95; 100: lossless) and jpg (None: 90), 1 to 100.

    Raises:
        ValueError: another suffix, shape or type, or the file cannot be written.
    """
    path = Path(path)
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    if image.ndim != 3 or not image.is_floating_point():
        raise ValueError(
            f"a {image.dtype} tensor of shape {list(image.shape)}: give one image, floats "
            "[C, H, W] in [-1, 1]"
        )
    suffix = path.suffix.lower().removeprefix(".")
    if suffix == "npy":
        write_image(path, in_unit_range(image))
        return
    name = "jpg" if suffix == "jpeg" else suffix
    if name not in FORMATS:
        raise ValueError(f"{path}: give one of .{', .'.join(FORMATS)}, .jpeg and .npy")
    image_format = ImageFormat(name, quality)
    if image_format.suffix(image.shape[0]) == ".npy":
        raise ValueError(f"{path}: holds 1, 3 or 4 channels, not {image.shape[0]}; write .npy")
    image_format.check_size(*image.shape[1:])
    write_image(path, to_uint8(image), image_format)


def as_saved(image: Tensor) -> Tensor:
    """[C, H, W] in [-1, 1] as files hold it: uint8 where C is 1, 3 or 4, else float32 in [0, 1]."""
    if image.shape[0] in MODE_BY_CHANNELS:
        return to_uint8(image)
    return in_unit_range(image)


def in_unit_range(image: Tensor) -> Tensor:
    """Return floats in [-1, 1], clamped, as float32 in [0, 1]."""
    return (image.float().clamp(-1.0, 1.0) + 1.0) / 2.0


def for_display(image: Tensor, to_rgb: Callable[[Tensor], Tensor]) -> Tensor:
    """What `as_saved` gives as uint8 [3, H, W]; `to_rgb` is the model's."""
    return to_uint8(to_rgb(to_float(image)[None])[0])


def both_for_display(
    image: Tensor, reconstruction: Tensor, to_rgb: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`for_display` of both; where `to_rgb` stretches values, to the range of both."""
    both = for_display(torch.cat([image, reconstruction], 2), to_rgb)
    first, second = both.chunk(2, dim=2)
    return first, second


def image_suffix(channels: int) -> str:
    """Return the suffix of the files that `write_image` writes."""
    return PNG.suffix(channels)


def write_image(path: Path, image: Tensor, image_format: ImageFormat = PNG) -> None:
    """Write what `as_saved` gives: an image, or a `.npy` of float32 [H, W, C] in [0, 1].

    With 16 bits, `image` is floats in [0, 1].

    Raises:
        ValueError: the file cannot be written.
    """
    stream = BytesIO()
    if image_format.bits == 16 and image.shape[0] in MODE_BY_CHANNELS:
        values = (image.permute(1, 2, 0) * 65535).round().cpu().numpy().astype(np.uint16)
        stream.write(encode_16_bits(values))
    elif image.dtype == torch.uint8:
        _pillow(image).save(stream, **image_format.options())
    else:
        np.save(stream, image.permute(1, 2, 0).contiguous().cpu().numpy())
    replace_file(path, stream.getvalue())


def save_thumbnail(path: Path, *images: Tensor) -> None:
    """Write uint8 [3, H, W] side by side as a JPEG, each with sides of up to 128 pixels.

    Raises:
        ValueError: the file cannot be written.
    """
    small = [_pillow(image) for image in images]
    for each in small:
        each.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    thumbnail = Image.fromarray(np.concatenate([np.asarray(each) for each in small], axis=1))
    stream = BytesIO()
    thumbnail.save(stream, format="JPEG", quality=80)
    replace_file(path, stream.getvalue())


def _pillow(image: Tensor) -> Image.Image:
    """A Pillow image of uint8 [C, H, W] with C = 1, 3 or 4."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).contiguous().cpu().numpy())
