"""Go through a folder once, for the names and sizes of its files.

N files that are kept, D folders.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl_vae.data.images import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from kl_vae.data.paths import PathList, name_bytes
from kl_vae.data.split import file_size
from kl_vae.runtime.files import display_name

SHARD_EXTENSIONS = (".tar",)
KEPT_EXTENSIONS = frozenset(IMAGE_EXTENSIONS + ARRAY_EXTENSIONS + SHARD_EXTENSIONS)


class Scan(NamedTuple):
    """What a folder held when it was gone through.

    Attributes:
        files: those that may hold images, relative POSIX paths, sorted by their bytes.
        sizes: int64 [N], bytes of each; -1 of what is no regular file, as in `fingerprint`.
        kinds: how many files there are of each extension, of all files.
        folders: each that was looked into, as a relative path that ends in `/`, or is empty.
        states: int64 [D,3], `folder_state` of each.
    """

    files: PathList
    sizes: NDArray[np.int64]
    kinds: dict[str, int]
    folders: PathList
    states: NDArray[np.int64]


def scan_folder(root: Path) -> Scan:
    """List what is neither a folder nor hidden, with its size.

    Raises:
        ValueError: a folder cannot be read.
    """
    found: list[tuple[bytes, int]] = []
    kinds: Counter[str] = Counter()
    folders: list[str] = []
    states: list[tuple[int, int, int]] = []
    visited: set[tuple[int, int]] = set()  # links may lead back
    pending = deque([""])
    while pending:
        folder = pending.popleft()  # "" or "a/b/"
        try:
            status = os.stat(os.path.join(root, folder))
            folders.append(folder)
            states.append(folder_state(status))
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                # by name: of two links to one folder the same is followed on every machine
                for entry in sorted(entries, key=lambda entry: name_bytes(entry.name)):
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    linked = entry.is_symlink()
                    # os.path for links: of one that leads to itself, entry.is_dir() is an error
                    if os.path.isdir(entry) if linked else entry.is_dir():
                        # links last, so that a real folder is listed by its own name
                        (pending.append if linked else pending.appendleft)(f"{folder}{entry.name}/")
                        continue
                    kind = os.path.splitext(entry.name)[1].lower()
                    kinds[kind] += 1
                    if kind in KEPT_EXTENSIONS:
                        found.append((name_bytes(folder + entry.name), _size(entry)))
        except OSError as error:
            raise ValueError(
                f"cannot read the folder {display_name(os.path.join(root, folder))} "
                f"({error.strerror}): make it readable, or give another folder"
            ) from error
    found.sort()  # by their bytes, of which no two are the same
    return Scan(
        PathList.of_bytes([name for name, _ in found]),
        np.fromiter((size for _, size in found), np.int64, len(found)),
        dict(kinds),
        PathList.of(folders),
        np.array(states, np.int64),
    )


def folder_state(status: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when files come to a folder, leave it or are renamed in it.

    The time of its modification can be set back, as tar and rsync do; that of its change cannot.
    """
    # inodes may take 64 bits without a sign
    inode = status.st_ino - 2**64 if status.st_ino >= 2**63 else status.st_ino
    return inode, status.st_mtime_ns, status.st_ctime_ns


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return file_size(entry.stat())
    except OSError:  # it is gone, or a link that leads nowhere
        return -1
