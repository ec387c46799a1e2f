"""One file of a folder of latents.

n images, z latent channels, h and w the latents' height and width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kl_vae.data.latent_index import LatentSettings, ShardEntry
from kl_vae.data.paths import PathList
from kl_vae.runtime.files import display_name, sha256_of

KEYS = "keys"  # of the images: JSON in the file's metadata
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_AGAIN = "copy it again, or give the command that wrote it once more, with --resume"


class LatentShard(NamedTuple):
    """A file's tensors, mapped: what is used of them is read then."""

    latents: Tensor  # [n, z, h, w], or of moments [n, 2z, h, w]
    flipped: Tensor | None  # likewise
    labels: Tensor | None  # [n], int64
    keys: PathList


def open_shard(path: Path, entry: ShardEntry, settings: LatentSettings) -> LatentShard:
    """Map a file whose tensors are those that the index says.

    Raises:
        ValueError: it is missing, damaged, or holds something else.
    """
    from safetensors import safe_open

    name = display_name(path)
    check_size(path, entry)  # where it has been cut short since, mapping it would end the process
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            keys = PathList.of(json.loads((file.metadata() or {}).get(KEYS, "null")))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # each version has its own; a panic of Rust is no Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: cannot be read ({reason}); {_AGAIN}") from None
    found = {key: (list(x.shape), x.dtype) for key, x in tensors.items()}
    if found != _expected(entry, settings) or len(keys) != entry.number:
        raise ValueError(f"{name}: holds something else than the index says; {_AGAIN}")
    flipped, labels = tensors.get("flipped"), tensors.get("labels")
    return LatentShard(tensors["latents"], flipped, labels, keys)


def check_size(path: Path, entry: ShardEntry) -> None:
    """Raise ValueError unless a file is there with the size that the index says."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(
            f"{display_name(path)}: a shard that cannot be found ({error.strerror}); {_AGAIN}"
        ) from None
    if size != entry.bytes:
        raise ValueError(
            f"{display_name(path)}: {size:,} bytes, and {entry.bytes:,} were written; {_AGAIN}"
        )


def is_whole(path: Path, entry: ShardEntry) -> bool:
    """Whether a file is there with the size and the sha256 that the index says."""
    try:
        return path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256
    except OSError:
        return False


def _expected(
    entry: ShardEntry, settings: LatentSettings
) -> dict[str, tuple[list[int], torch.dtype]]:
    latents = ([entry.number, *settings.shape], DTYPES[settings.dtype])
    expected = {"latents": latents}
    if settings.flipped:
        expected["flipped"] = latents
    if settings.labels is not None:
        expected["labels"] = ([entry.number], torch.int64)
    return expected
