"""Image sources of a command."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kl_vae.data import (
    MAX_PIXELS,
    FolderSource,
    JoinedSource,
    Source,
    StoredSource,
    ValueRange,
    decide_format,
    is_shard,
    open_root,
    resolve_root,
    with_format,
)
from kl_vae.model import AutoEncoderKL


def as_roots(images: str | Path | Sequence[str | Path]) -> list[str]:
    """Return one or several roots as the list of strings that `open_sources` expects."""
    return [str(root) for root in ([images] if isinstance(images, (str, Path)) else images)]


def range_of(model: AutoEncoderKL, value_range: ValueRange | None) -> ValueRange:
    """Return the given range, else the one of the images that the model was trained on."""
    return model.pixel_range if value_range is None else value_range


def open_sources(
    roots: Sequence[str],
    channels: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange = "auto",
    pages: str | None = None,
) -> tuple[JoinedSource, list[Path]]:
    """Join the images of folders, tar shards and single files, in the given order.

    Args:
        roots: folders of images or shards, shards, or glob patterns of shards, see
            `kl_vae.data.open_root`; or image files, to which `include` and `exclude` do not apply.
        channels: the model's in_channels.
        include: glob patterns of images to include; empty: all images.
        exclude: glob patterns of images to exclude.
        max_pixels: larger images are rejected before decoding.
        value_range: values of black and white, as `data.range` of a config.
        pages: what the pages of TIFF files are, as `data.pages` of a config.

    Returns:
        The images without duplicates, and the folders among `roots`.

    Raises:
        ValueError: a root does not exist, cannot be read, or contains no image; see also
            `kl_vae.data.decide_format`.
    """
    seen: set[str] = set()
    parts: list[StoredSource] = []
    folders = []
    for root in roots:
        path = resolve_root(root)
        if os.path.isdir(path):
            folders.append(path)
        part: StoredSource
        if os.path.lexists(path) and not (os.path.isdir(path) or is_shard(path)):
            # errors in the file are reported when it is read
            part = FolderSource(path.parent, [path.name], channels, max_pixels)
        else:
            part = open_root(root, channels, include, exclude, max_pixels)
        if len(roots) > 1:
            new = []
            for index, place in enumerate(part.places()):
                if place not in seen:
                    seen.add(place)
                    new.append(index)
            part = part.subset(np.array(new, np.int64)) if len(new) < len(part) else part
        if len(part):
            parts.append(part)
    pixel_format = decide_format(JoinedSource(parts), value_range, pages)
    return JoinedSource([with_format(part, pixel_format) for part in parts]), folders


def modification_times(source: Source) -> str:
    """Return a hash of the modification times of a source's images: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(source)):
        digest.update(b"%d " % source.state(index)[1])
    return digest.hexdigest()


def size_in_words(resize: int | None, crop: int | None) -> str:
    """Return resize and crop as they are printed beside PSNR, which depends on them."""
    parts = [f"short side {resize}"] if resize else []
    parts += [f"center crop {crop}"] if crop else []
    return ", ".join(parts) or "full size"
