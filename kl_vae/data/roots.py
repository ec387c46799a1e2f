"""Open what a root names: a folder of images, tar shards in a folder, one shard, or a pattern."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from kl_vae.data.decoding import MAX_PIXELS
from kl_vae.data.folder import (
    SHARD_EXTENSIONS,
    Listing,
    image_extensions,
    images_of,
    list_folder,
    select,
)
from kl_vae.data.paths import name_bytes
from kl_vae.data.sources import FolderSource, StoredSource
from kl_vae.data.tar_shards import open_shards
from kl_vae.runtime.files import display_name

PACKAGE_PREFIX = "package:"
# what `pip install` needs for the packages whose images the examples use
INSTALL_NAMES = {"skimage": "'kl-vae[demo]'"}
MAX_SHARDS = 1_000_000  # of one pattern: each is a file
# how shards end that cannot be read at random
_COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def resolve_root(root: str) -> Path:
    """Return the folder or file that `root` names: a path, `~/...`, or `package:NAME/FOLDER`.

    `package:skimage/data` is a folder inside an installed Python package,
    which is found without being imported.

    Raises:
        ValueError: the package is not installed.
    """
    if not root.startswith(PACKAGE_PREFIX):
        return Path(os.path.expanduser(root))
    name, _, folder = root.removeprefix(PACKAGE_PREFIX).partition("/")
    # a dotted name would be imported in order to be found
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{root}: no Python package {name!r} is installed: "
            f"pip install {INSTALL_NAMES.get(name, name)}, or give a folder"
        )
    return Path(spec.submodule_search_locations[0], folder)


def open_root(
    root: str,
    channels: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> StoredSource:
    """Open the images of a root, all that the patterns leave.

    Args:
        root: a folder, which holds images or `.tar` files; a `.tar` file; or a pattern of them,
            see `expand_pattern`. `~/...` and `package:NAME/...` as in `resolve_root`.
        channels: C.
        include: patterns of the images' paths, in shards of the members' names; see `select`.
        exclude: of those to leave out. Of a folder's shards those are left out whose paths match
            a pattern that ends in `.tar`.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        ValueError: there is no such root, no image in it, images and shards are mixed, or a shard
            cannot be read.
    """
    path = resolve_root(root)
    if _is_pattern(str(path)):
        shards = expand_pattern(str(path))
    elif is_shard(path) and not os.path.isdir(path):
        shards = [path]
    else:
        listing = list_folder(path)
        shards = _shards_of(listing, path, channels, include, exclude)
        if not shards:
            files, sizes, _ = images_of(listing, path, channels, include, exclude)
            return FolderSource(path, files, channels, max_pixels, sizes)
    return open_shards(shards, channels, include, exclude, max_pixels)


def is_shard(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name is that of a tar shard."""
    return os.fspath(path).lower().endswith(SHARD_EXTENSIONS)


def _shards_of(
    listing: Listing, root: Path, channels: int, include: Sequence[str], exclude: Sequence[str]
) -> list[Path]:
    """Return a folder's shards; none where it holds images.

    Raises:
        ValueError: it holds both, or nothing but compressed shards.
    """
    kinds = listing.kinds
    images = [extension for extension in image_extensions(channels, include) if extension in kinds]
    compressed = [kind for kind in _COMPRESSED if kind in kinds]
    if not kinds.keys() & set(SHARD_EXTENSIONS):
        if compressed and not images:
            raise ValueError(
                f"no images in {display_name(root)}, and its {compressed[0]} files are compressed: "
                "were they shards, images could be read one after the other only; decompress them"
            )
        return []
    of_shards = [pattern for pattern in exclude if pattern.lower().endswith(SHARD_EXTENSIONS)]
    shards = select(filter(is_shard, listing.files), (), of_shards)
    if shards and images:
        image = next(path for path in listing.files if path.lower().endswith(tuple(images)))
        raise ValueError(
            f"{display_name(root)} holds shards, such as {display_name(shards[0])}, beside images, "
            f"such as {display_name(image)}: move either into a folder of its own, give the shards "
            "as a pattern ('FOLDER/*.tar'), or leave them out with exclude='*.tar'"
        )
    return [root / shard for shard in shards]


# --- patterns


def _is_pattern(root: str) -> bool:
    """Whether a root names files by a pattern; what exists under that name is none."""
    return any(sign in root for sign in "*?[{") and not os.path.lexists(root)


def expand_pattern(pattern: str) -> list[Path]:
    """Return the shards that a pattern names, sorted by the bytes of their paths, each once.

    `{0000..0127}` stands for numbers, of as many digits as its ends have, `{a,b}` for each of
    several texts, and `*`, `?` and `[...]` for what the folder holds.

    Raises:
        ValueError: a shard that braces name is not there, nothing matches, or what does is no
            `.tar` file.
    """
    paths: set[str] = set()
    missing: list[str] = []
    for number, name in enumerate(_expand_braces(pattern)):
        if number >= MAX_SHARDS:
            raise ValueError(
                f"{display_name(pattern)}: names more than {MAX_SHARDS:,} files; give fewer"
            )
        found = [name] if os.path.exists(name) else glob.glob(name) * glob.has_magic(name)
        paths.update(found)
        missing += [name] * (not found)
    if missing:
        others = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{display_name(pattern)}: no such file: {display_name(missing[0])}{others}; "
            "name shards that are there"
        )
    shards = sorted(paths, key=name_bytes)
    for path in shards:
        if os.path.isdir(path) or not is_shard(path):
            raise ValueError(
                f"{display_name(pattern)}: {display_name(path)} is no .tar file; a pattern is "
                "for shards, of a folder of images give the folder"
            )
    return [Path(path) for path in shards]


def _expand_braces(pattern: str) -> Iterator[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    for text in _alternatives(braces[1]):
        for rest in _expand_braces(after):
            yield before + text + rest


def _alternatives(content: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(content)
    if numbers is None:
        yield from content.split(",")
        return
    first, last = int(numbers[1]), int(numbers[2])
    digits = max(map(len, numbers.groups())) if "0" in (numbers[1][0], numbers[2][0]) else 1
    step = 1 if first <= last else -1
    for number in range(first, last + step, step):
        yield f"{number:0{digits}}"
