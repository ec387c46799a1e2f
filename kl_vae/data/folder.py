"""List the images of a folder, the same on every machine."""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl_vae.data.images import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from kl_vae.data.listing_cache import cached_scan
from kl_vae.data.paths import PathList
from kl_vae.data.pil_modes import MODE_BY_CHANNELS
from kl_vae.data.scan import KEPT_EXTENSIONS, Scan
from kl_vae.runtime.files import display_name


def list_images(
    root: Path, channels: int, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """List the image files under `root`: relative POSIX paths, sorted by their bytes.

    Linked folders are followed, each folder once; hidden files and folders are
    left out. What is no folder counts as a file, a named pipe or a link that leads
    nowhere as well: who reads it says what is wrong. Where `channels` is 1, 3 or 4
    the images are image files, and `.npy` files as well only if a pattern of
    `include` ends in `.npy`; for other numbers of channels they are `.npy` files.
    `include` and `exclude` are as in `select`. The list of a large folder may be from the cache;
    see `cached_scan`.

    Raises:
        ValueError: there is no such folder, a folder cannot be read, or there is no image.
    """
    return list(list_folder(root, channels, include, exclude).paths)


class Listing(NamedTuple):
    """The images of a folder.

    Attributes:
        paths: relative POSIX paths, sorted by their bytes.
        sizes: int64, of each in bytes; -1 of what is no regular file.
    """

    paths: PathList
    sizes: NDArray[np.int64]


def list_folder(
    root: Path,
    channels: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    cache: bool = True,
) -> Listing:
    """`list_images`, with sizes and in little memory.

    The list of a large folder is taken from the cache, if `cache`; see `cached_scan`.

    Raises:
        ValueError: as in `list_images`.
    """
    return images_of(scan_root(root, cache), root, channels, include, exclude)


def scan_root(root: Path, cache: bool = True) -> Scan:
    """`cached_scan` of a folder that has to be there.

    Raises:
        ValueError: there is no such folder, or a folder in it cannot be read.
    """
    if not os.path.isdir(root):  # root.is_dir() raises where a parent may not be read
        problem = "not a folder" if os.path.exists(root) else "no such folder"
        raise ValueError(f"{problem}: {display_name(root)}; give an existing folder of images")
    return cached_scan(root, cache)


def images_of(
    scan: Scan, root: Path, channels: int, include: Sequence[str], exclude: Sequence[str]
) -> Listing:
    """Choose the images among a folder's files.

    Raises:
        ValueError: there is none, or the patterns leave none.
    """
    extensions = image_extensions(channels, include)
    if KEPT_EXTENSIONS & scan.kinds.keys() <= set(extensions):  # of a million this saves a second
        images = np.arange(len(scan.files))
    else:
        images = with_extensions(scan.files, extensions)
    if not len(images):
        raise ValueError(
            f"no images in {display_name(root)}: looked for {', '.join(extensions)}"
            f"{_describe_others(scan.kinds)}"
        )
    chosen = chosen_by(scan.files, images, include, exclude, display_name(root))
    if len(chosen) == len(scan.files):  # nothing is to be copied
        return Listing(scan.files, scan.sizes)
    return Listing(scan.files.take(chosen), scan.sizes[chosen])


def image_extensions(channels: int, include: Sequence[str]) -> tuple[str, ...]:
    """Return how the names of images end that have so many channels; see `list_images`."""
    of_arrays = any(pattern.lower().endswith(ARRAY_EXTENSIONS) for pattern in include)
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS if channels in MODE_BY_CHANNELS else ()
    return extensions + ARRAY_EXTENSIONS if of_arrays or not extensions else extensions


def with_extensions(paths: PathList, extensions: Sequence[str]) -> NDArray[np.int64]:
    """Return the numbers of the paths that end so, whatever their case."""
    endings = {extension.encode() for extension in extensions}
    return numbers_of(os.path.splitext(p)[1].lower() in endings for p in paths.bytes_of_each())


def chosen_by(
    paths: PathList,
    images: NDArray[np.int64],
    include: Sequence[str],
    exclude: Sequence[str],
    where: str,
) -> NDArray[np.int64]:
    """Return the numbers, of those in `images`, of the paths that the patterns leave.

    Raises:
        ValueError: there is none; `where` says of which folder or shards.
    """
    if not (include or exclude):
        return images
    chosen = images[numbers_of(map(matcher(include, exclude), paths.take(images)))]
    if not len(chosen):
        raise ValueError(
            f"include={list(include)} and exclude={list(exclude)} leave none of the "
            f"{len(images)} images in {where}: change the patterns"
        )
    return chosen


def select(paths: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Keep the paths that match a pattern of `include`, if it has any, and none of `exclude`.

    Patterns are those of `fnmatch` over the relative path, where `*` crosses
    `/`; a pattern without `/` matches the file's name in any folder, too.
    """
    return list(filter(matcher(include, exclude), paths))


def matcher(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Return whether `select` keeps a path."""
    included, excluded = _matcher(include or ["*"]), _matcher(exclude)
    return lambda path: included(path) and not excluded(path)


def numbers_of(flags: Iterable[bool]) -> NDArray[np.int64]:
    """Return which of the flags are set."""
    return np.flatnonzero(np.fromiter(flags, np.bool_))


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    whole = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
    names = [re.compile(fnmatch.translate(pattern)) for pattern in patterns if "/" not in pattern]

    def matches(path: str) -> bool:
        name = path.rpartition("/")[2]
        return any(p.match(path) for p in whole) or any(p.match(name) for p in names)

    return matches


def _describe_others(kinds: Mapping[str, int]) -> str:
    most = ", ".join(
        f"{count} {display_name(kind or 'no extension')}"
        for kind, count in Counter(kinds).most_common(3)
    )
    total = sum(kinds.values())
    return f"; it holds {total} other files ({most})" if total else "; it holds no files"
