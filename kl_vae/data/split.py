"""Hold out a part of a folder's images, by each file's own name."""

import os
import stat
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from kl_vae.data.folder import name_bytes


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
    training = [path for path in paths if not held_out(path, fraction)]
    validation = [path for path in paths if held_out(path, fraction)]
    return training, validation


def fingerprint(root: Path, paths: Sequence[str]) -> str:
    """Return 32 hex digits of the relative paths, their order, and the sizes of the files.

    The size of what is gone, a link that leads nowhere, or no regular file counts as -1.
    """
    digest = blake2b(digest_size=16)
    for path in paths:
        digest.update(b"%s\0%d\n" % (name_bytes(path), _size(os.path.join(root, path))))
    return digest.hexdigest()


def _size(path: str) -> int:
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
