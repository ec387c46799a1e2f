"""Listing of the images in a folder, in an order that does not depend on the machine.

Shapes: N files.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl_vae.data.file_types import (
    ARRAY_EXTENSIONS,
    BANDS_EXTENSIONS,
    IMAGE_EXTENSIONS,
    KNOWN_EXTENSIONS,
    how_to_read,
    skipped_message,
)
from kl_vae.data.paths import PathList, file_size, name_bytes
from kl_vae.data.pixels import MODE_BY_CHANNELS
from kl_vae.runtime.files import display_name

logger = logging.getLogger(__name__)

SHARD_EXTENSIONS = (".tar",)
LISTED_EXTENSIONS = KNOWN_EXTENSIONS.union(SHARD_EXTENSIONS)


def list_images(
    root: Path, channels: int, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Return the images under `root` as relative POSIX paths, sorted by their bytes.

    Linked folders are followed, each folder once. Hidden files and folders are ignored. Broken
    links and special files are listed; reading them raises an error.

    Files of other types of images, such as HEIC without its plugin, are reported in one warning.

    With 1, 3 or 4 channels, image files are listed, and `.npy` files only if a pattern of `include`
    ends in `.npy`. With other numbers of channels, TIFF and `.npy` files are listed.

    Args:
        root: the folder.
        channels: C.
        include: patterns as in `select`.
        exclude: patterns as in `select`.

    Raises:
        ValueError: The folder does not exist, a folder cannot be read, or there is no image.
    """
    return list(images_of(list_folder(root), root, channels, include, exclude).files)


class Listing(NamedTuple):
    """Image, array and shard files of a folder, readable or not, or a selection of them.

    Attributes:
        files: relative POSIX paths, sorted by their bytes.
        sizes: int64 [N], sizes in bytes; -1 if not a regular file, as in `fingerprint`.
        kinds: number of files per extension, over all files in the folder.
    """

    files: PathList
    sizes: NDArray[np.int64]
    kinds: dict[str, int]


def list_folder(root: Path) -> Listing:
    """Return the images, arrays and shards under `root` with their sizes; see `list_images`.

    Raises:
        ValueError: The folder does not exist, or a folder in it cannot be read.
    """
    if not os.path.isdir(root):  # root.is_dir() raises if a parent is not readable
        problem = "not a folder" if os.path.exists(root) else "no such folder"
        raise ValueError(f"{problem}: {display_name(root)}; give an existing folder of images")
    found: list[tuple[bytes, int]] = []
    kinds: Counter[str] = Counter()
    visited: set[tuple[int, int]] = set()  # links may form cycles
    pending = deque([""])
    while pending:
        folder = pending.popleft()  # "" or "a/b/"
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                # sorted, so that the same one of two links to a folder is followed everywhere
                for entry in sorted(entries, key=lambda entry: name_bytes(entry.name)):
                    if is_hidden(entry.name):
                        continue
                    linked = entry.is_symlink()
                    # os.path.isdir for links: entry.is_dir() raises for a link to itself
                    if os.path.isdir(entry) if linked else entry.is_dir():
                        # links last, so that a folder is listed under its own name
                        (pending.append if linked else pending.appendleft)(f"{folder}{entry.name}/")
                        continue
                    kind = os.path.splitext(entry.name)[1].lower()
                    kinds[kind] += 1
                    if kind in LISTED_EXTENSIONS:
                        found.append((name_bytes(folder + entry.name), _size(entry)))
        except OSError as error:
            raise ValueError(
                f"cannot read the folder {display_name(os.path.join(root, folder))} "
                f"({error.strerror}): make it readable, or give another folder"
            ) from error
    found.sort()  # by path bytes, which are unique
    sizes = np.fromiter((size for _, size in found), np.int64, len(found))
    return Listing(PathList.of_bytes([name for name, _ in found]), sizes, dict(kinds))


def images_of(
    listing: Listing, root: Path, channels: int, include: Sequence[str], exclude: Sequence[str]
) -> Listing:
    """Select the images of a folder's listing; the arguments are those of `list_images`.

    Raises:
        ValueError: There are no images, or the patterns exclude all.
    """
    files, sizes, kinds = listing
    extensions = image_extensions(channels, include)
    others = Counter(kinds).most_common(3)
    most = ", ".join(f"{count} {display_name(kind or 'no extension')}" for kind, count in others)
    holds = f"{sum(kinds.values())} other files ({most})" if kinds else "no files"
    no_images = "; ".join(
        [
            f"no images in {display_name(root)}: looked for {', '.join(extensions)}",
            f"found {holds}",
            *how_to_read(set(kinds).difference(extensions)),
        ]
    )
    chosen = choose_images(files, extensions, include, exclude, display_name(root), no_images)
    if len(chosen) == len(files):  # avoid a copy
        return listing
    return Listing(files.take(chosen), sizes[chosen], kinds)


def image_extensions(channels: int, include: Sequence[str]) -> tuple[str, ...]:
    """Return the extensions of images with this number of channels; see `list_images`."""
    of_arrays = any(pattern.lower().endswith(ARRAY_EXTENSIONS) for pattern in include)
    if channels not in MODE_BY_CHANNELS:
        return BANDS_EXTENSIONS + ARRAY_EXTENSIONS
    return IMAGE_EXTENSIONS + ARRAY_EXTENSIONS if of_arrays else IMAGE_EXTENSIONS


def choose_images(
    paths: PathList,
    extensions: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    where: str,
    no_images: str,
) -> NDArray[np.int64]:
    """Return the indices of the paths that have one of the extensions and match the patterns.

    The other paths that match the patterns are reported in one warning.

    Args:
        paths: of files, or of members of shards.
        extensions: in lower case.
        include: patterns as in `select`.
        exclude: patterns as in `select`.
        where: name of the folder or the shards in error messages.
        no_images: error message if no path has one of the extensions.

    Raises:
        ValueError: No path is selected.
    """
    endings = tuple(extension.encode() for extension in extensions)
    readable = np.fromiter(
        (path.lower().endswith(endings) for path in paths.bytes_of_each()), np.bool_, len(paths)
    )
    images = np.flatnonzero(readable)
    if not len(images):
        raise ValueError(no_images)
    matches = matcher(include, exclude)
    report_skipped(filter(matches, paths.take(np.flatnonzero(~readable))), where)
    if not (include or exclude):
        return images
    chosen = images[_true_indices(map(matches, paths.take(images)))]
    if not len(chosen):
        raise ValueError(
            f"include={list(include)} and exclude={list(exclude)} match none of the "
            f"{len(images)} images in {where}: change the patterns"
        )
    return chosen


def report_skipped(paths: Iterable[str], where: str) -> None:
    """Log one warning about the files that are skipped, if any.

    Args:
        paths: of the files.
        where: name of the folder or the shards.
    """
    skipped = Counter(os.path.splitext(path)[1].lower() for path in paths)
    if skipped:
        logger.warning("%s: %s", where, skipped_message(skipped))


def select(paths: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the paths that match any pattern of `include`, if given, and none of `exclude`.

    Patterns are `fnmatch` patterns of the relative path, in which `*` also matches `/`. A pattern
    without `/` also matches the file name in any folder.
    """
    return list(filter(matcher(include, exclude), paths))


def matcher(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Return the predicate that `select` applies to each path."""
    included, excluded = _matcher(include or ["*"]), _matcher(exclude)
    return lambda path: included(path) and not excluded(path)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden; `__MACOSX` contains macOS archive metadata."""
    return name.startswith(".") or name == "__MACOSX"


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    whole = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
    names = [re.compile(fnmatch.translate(pattern)) for pattern in patterns if "/" not in pattern]

    def matches(path: str) -> bool:
        name = path.rpartition("/")[2]
        return any(p.match(path) for p in whole) or any(p.match(name) for p in names)

    return matches


def _true_indices(flags: Iterable[bool]) -> NDArray[np.int64]:
    """Return the indices of the true flags: int64."""
    return np.flatnonzero(np.fromiter(flags, np.bool_))


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return file_size(entry.stat())
    except OSError:  # deleted meanwhile, or a broken link
        return -1
