"""Keep what a large folder holds, for as long as nothing comes to it, leaves it or is renamed."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kl_vae.data.array_cache import load_arrays, save_arrays
from kl_vae.data.paths import PathList
from kl_vae.data.scan import Scan, folder_state, scan_folder

logger = logging.getLogger(__name__)

CACHED_FILES = 10_000  # of fewer the listing is fast, and not kept
# a change within the same tick of a file system's clock would not be seen: FAT's is the slowest
RACY_NS = 2_000_000_000
_KIND = "folder"


def cached_scan(root: Path, cache: bool = True) -> Scan:
    """`scan_folder`, or what an earlier one of the same folder gave, where that still holds.

    It holds as long as each folder in it, those behind links as well, has the inode and the times
    that it had. A file that is written anew in its place, with another size, is not noticed.

    Args:
        root: the folder.
        cache: whether anything is taken from the cache, or kept in it.

    Raises:
        ValueError: a folder cannot be read.
    """
    if not cache:
        return scan_folder(root)
    place = os.path.realpath(root)
    scan = _load(place)
    if scan is not None and _holds(root, scan):
        return scan
    began = time.time_ns()
    scan = scan_folder(root)
    if len(scan.files) >= CACHED_FILES:
        if scan.states[:, 1:].max() <= began - RACY_NS:
            _save(place, scan)
        else:
            logger.info("%d files were listed, and may still be changing", len(scan.files))
    return scan


def _holds(root: Path, scan: Scan) -> bool:
    try:
        for folder, state in zip(scan.folders, scan.states.tolist(), strict=True):
            if list(folder_state(os.stat(os.path.join(root, folder)))) != state:
                return False
    except OSError:
        return False
    return True


def _load(place: str) -> Scan | None:
    stored = load_arrays(_KIND, place)
    if stored is None:
        return None
    about, arrays = stored
    return Scan(
        PathList(arrays["files"].tobytes(), arrays["file_ends"]),
        arrays["sizes"],
        about["kinds"],
        PathList(arrays["folders"].tobytes(), arrays["folder_ends"]),
        arrays["states"],
    )


def _save(place: str, scan: Scan) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "files": np.frombuffer(scan.files.block, np.uint8),
        "file_ends": scan.files.ends,
        "sizes": scan.sizes,
        "folders": np.frombuffer(scan.folders.block, np.uint8),
        "folder_ends": scan.folders.ends,
        "states": scan.states,
    }
    save_arrays(_KIND, place, {"kinds": scan.kinds}, arrays)
