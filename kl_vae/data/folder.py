"""List the images of a folder, the same on every machine; N files."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl_vae.data.decoding import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from kl_vae.data.paths import PathList, file_size, name_bytes
from kl_vae.data.pixels import MODE_BY_CHANNELS
from kl_vae.runtime.files import display_name

SHARD_EXTENSIONS = (".tar",)
LISTED_EXTENSIONS = frozenset(IMAGE_EXTENSIONS + ARRAY_EXTENSIONS + SHARD_EXTENSIONS)


def list_images(
    root: Path, channels: int, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """List the image files under `root`: relative POSIX paths, sorted by their bytes.

    Linked folders are followed, each folder once; hidden files and folders are
    left out. What is no folder counts as a file, a named pipe or a link that leads
    nowhere as well: who reads it says what is wrong. Where `channels` is 1, 3 or 4
    the images are image files, and `.npy` files as well only if a pattern of
    `include` ends in `.npy`; for other numbers of channels they are `.npy` files.
    `include` and `exclude` are as in `select`.

    Raises:
        ValueError: there is no such folder, a folder cannot be read, or there is no image.
    """
    return list(images_of(list_folder(root), root, channels, include, exclude).files)


class Listing(NamedTuple):
    """The files of a folder that may hold images, or those of them that are chosen.

    Attributes:
        files: relative POSIX paths, sorted by their bytes.
        sizes: int64 [N], bytes of each; -1 of what is no regular file, as in `fingerprint`.
        kinds: the number of files of each extension, of all files in the folder.
    """

    files: PathList
    sizes: NDArray[np.int64]
    kinds: dict[str, int]


def list_folder(root: Path) -> Listing:
    """List images, arrays and shards under `root`, with their sizes; see `list_images`.

    Raises:
        ValueError: there is no such folder, or a folder in it cannot be read.
    """
    if not os.path.isdir(root):  # root.is_dir() raises where a parent may not be read
        problem = "not a folder" if os.path.exists(root) else "no such folder"
        raise ValueError(f"{problem}: {display_name(root)}; give an existing folder of images")
    found: list[tuple[bytes, int]] = []
    kinds: Counter[str] = Counter()
    visited: set[tuple[int, int]] = set()  # links may lead back
    pending = deque([""])
    while pending:
        folder = pending.popleft()  # "" or "a/b/"
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                # by name: of two links to one folder the same is followed on every machine
                for entry in sorted(entries, key=lambda entry: name_bytes(entry.name)):
                    if is_hidden(entry.name):
                        continue
                    linked = entry.is_symlink()
                    # os.path for links: of one that leads to itself, entry.is_dir() is an error
                    if os.path.isdir(entry) if linked else entry.is_dir():
                        # links last, so that a real folder is listed by its own name
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
    found.sort()  # by their bytes, of which no two are the same
    sizes = np.fromiter((size for _, size in found), np.int64, len(found))
    return Listing(PathList.of_bytes([name for name, _ in found]), sizes, dict(kinds))


def images_of(
    listing: Listing, root: Path, channels: int, include: Sequence[str], exclude: Sequence[str]
) -> Listing:
    """Choose the images among a folder's files; the arguments are those of `list_images`.

    Raises:
        ValueError: there is none, or the patterns leave none.
    """
    files, sizes, kinds = listing
    extensions = image_extensions(channels, include)
    others = Counter(kinds).most_common(3)
    most = ", ".join(f"{count} {display_name(kind or 'no extension')}" for kind, count in others)
    holds = f"{sum(kinds.values())} other files ({most})" if kinds else "no files"
    no_images = (
        f"no images in {display_name(root)}: looked for {', '.join(extensions)}; it holds {holds}"
    )
    chosen = choose_images(files, extensions, include, exclude, display_name(root), no_images)
    if len(chosen) == len(files):  # nothing is to be copied
        return listing
    return Listing(files.take(chosen), sizes[chosen], kinds)


def image_extensions(channels: int, include: Sequence[str]) -> tuple[str, ...]:
    """Return how the names of images end that have so many channels; see `list_images`."""
    of_arrays = any(pattern.lower().endswith(ARRAY_EXTENSIONS) for pattern in include)
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS if channels in MODE_BY_CHANNELS else ()
    return extensions + ARRAY_EXTENSIONS if of_arrays or not extensions else extensions


def choose_images(
    paths: PathList,
    extensions: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    where: str,
    no_images: str,
) -> NDArray[np.int64]:
    """Return the numbers of the paths with these extensions that the patterns leave.

    Args:
        paths: of files, or of members of shards.
        extensions: in lower case.
        include: patterns as in `select`.
        exclude: the same.
        where: the folder or shards, in errors.
        no_images: the error where no path has one of the extensions.

    Raises:
        ValueError: there is none.
    """
    endings = tuple(extension.encode() for extension in extensions)
    images = _flagged(path.lower().endswith(endings) for path in paths.bytes_of_each())
    if not len(images):
        raise ValueError(no_images)
    if not (include or exclude):
        return images
    chosen = images[_flagged(map(matcher(include, exclude), paths.take(images)))]
    if not len(chosen):
        raise ValueError(
            f"include={list(include)} and exclude={list(exclude)} leave none of the "
            f"{len(images)} images in {where}: change the patterns"
        )
    return chosen


def select(paths: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Keep the paths that match a pattern of `include`, if it has any, and none of `exclude`.

    Patterns are those of `fnmatch` over the relative path, where `*` crosses
    `/`; a pattern without `/` matches the file's name in any folder, too.
    """
    return list(filter(matcher(include, exclude), paths))


def matcher(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Return whether `select` keeps a path."""
    included, excluded = _matcher(include or ["*"]), _matcher(exclude)
    return lambda path: included(path) and not excluded(path)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out; `__MACOSX` is what macOS packs as well."""
    return name.startswith(".") or name == "__MACOSX"


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    whole = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
    names = [re.compile(fnmatch.translate(pattern)) for pattern in patterns if "/" not in pattern]

    def matches(path: str) -> bool:
        name = path.rpartition("/")[2]
        return any(p.match(path) for p in whole) or any(p.match(name) for p in names)

    return matches


def _flagged(flags: Iterable[bool]) -> NDArray[np.int64]:
    """Return which of the flags are set."""
    return np.flatnonzero(np.fromiter(flags, np.bool_))


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return file_size(entry.stat())
    except OSError:  # it is gone, or a link that leads nowhere
        return -1
