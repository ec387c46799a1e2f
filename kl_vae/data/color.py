"""Conversion of the colours of Pillow images to sRGB by their ICC profiles."""

from __future__ import annotations

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

# Pillow's modes by colour space of a profile
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
# largest difference of a colour channel, of 255, up to which a profile counts as sRGB
SAME = 1


def to_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """Convert an image of mode 1, L, RGB or CMYK to sRGB: mode 1, L or RGB.

    Conversion is by littleCMS with the perceptual intent. Without a profile, RGB is sRGB, and CMYK
    is converted by Pillow's formula. A profile that cannot be used is a warning.

    Args:
        image: without alpha.
        profile: the ICC profile of the file; None: it has none.
        name: of the image in warnings.
    """
    if profile:
        try:
            mode, transform = _transform(profile)
            if mode == "RGB" and image.mode in ("1", "L"):
                image = image.convert("RGB")
            if mode == "L" and image.mode == "1":
                image = image.convert("L")
            if mode != image.mode:
                raise ValueError(f"it is for {mode} images, and the image is {image.mode}")
            return image if transform is None else _apply(transform, image)
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            _warn_once(name, " ".join(str(error).split()))
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


@lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode that a profile applies to, and its transform; None: it is sRGB."""
    parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = parsed.profile.xcolor_space.strip()
    if space not in _MODES:
        raise ValueError(f"its colour space is {space!r}")
    mode = _MODES[space]
    transform = ImageCms.buildTransform(parsed, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return mode, transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)  # 18 of them
    colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 18, 3)
    probe = Image.fromarray(colors if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    changed = np.asarray(_apply(transform, probe), np.int16)
    difference = np.abs(changed - np.asarray(probe.convert("RGB"))).max()
    return mode, None if difference <= SAME else transform


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is, only for inPlace
    return converted


@lru_cache(maxsize=4096)
def _warn_once(name: str, reason: str) -> None:
    logger.warning("%s: its colour profile is not used (%s); read as sRGB", name, reason)
