"""Hold out a part of the images, by each one's own name."""

import os
import stat
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

from kl_vae.data.paths import PathList, name_bytes


def name_hash(relative_path: str) -> float:
    """Return a number in [0, 1) that depends on the relative path alone, uniform over paths."""
    digest = blake2b(name_bytes(relative_path), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def held_out(relative_path: str, fraction: float) -> bool:
    """Whether a file belongs to the held-out `fraction`, whatever other files there are."""
    return name_hash(relative_path) < fraction


def split(paths: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split into (training, validation), each in the order of `paths`; `fraction` in [0, 1)."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: give a number of at least 0 and less than 1")
    training: list[str] = []
    validation: list[str] = []
    for path in paths:
        (validation if held_out(path, fraction) else training).append(path)
    return training, validation


def fingerprint(root: Path, paths: Sequence[str]) -> str:
    """Return 32 hex digits of the relative paths, their order, and the sizes of the files.

    The size of what is gone, a link that leads nowhere, or no regular file counts as -1.
    """
    return fingerprint_of(paths, (_size(os.path.join(root, path)) for path in paths))


def fingerprint_of(paths: Sequence[str], sizes: Iterable[int]) -> str:
    """Return 32 hex digits of relative paths, their order, and the size of each file in bytes."""
    names = paths.bytes_of_each() if isinstance(paths, PathList) else map(name_bytes, paths)
    digest = blake2b(digest_size=16)
    for name, size in zip(names, sizes, strict=True):
        digest.update(b"%s\0%d\n" % (name, size))
    return digest.hexdigest()


def file_size(status: os.stat_result) -> int:
    """Return the size that counts for `fingerprint`."""
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _size(path: str) -> int:
    try:
        return file_size(os.stat(path))
    except OSError:
        return -1
