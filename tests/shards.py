"""Small tar shards in the layout of WebDataset."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 20, height: int = 16) -> bytes:
    """A PNG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def array(values: np.ndarray) -> bytes:
    """An `.npy` file."""
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def write_shard(path: Path, members: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    """Write members in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def make_shards(folder: Path, shards: int, images: int) -> dict[str, bytes]:
    """Write `train-0000.tar` and so on, with classes; return each image's content by its key."""
    contents = {}
    for number in range(shards):
        members = {}
        for sample in range(number * images, (number + 1) * images):
            members[f"{sample:05}.cls"] = str(sample % 7).encode()
            members[f"{sample:05}.json"] = b'{"caption": "%d"}' % sample
            members[f"{sample:05}.png"] = contents[f"{sample:05}.png"] = picture(sample)
        write_shard(folder / f"train-{number:04}.tar", members)
    return contents
