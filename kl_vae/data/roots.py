"""Opening of roots: a folder of images, a folder of tar shards, one shard, or a pattern."""

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
    report_skipped,
    select,
)
from kl_vae.data.paths import name_bytes
from kl_vae.data.sources import FolderSource, StoredSource
from kl_vae.data.tar_shards import open_shards
from kl_vae.runtime.files import display_name

PACKAGE_PREFIX = "package:"
# arguments of `pip install` for packages whose images the examples use
INSTALL_NAMES = {"skimage": "'kl-vae[demo]'"}
MAX_SHARDS = 1_000_000  # per pattern
# extensions of compressed shards, which do not support random access
_COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def resolve_root(root: str) -> Path:
    """Return the path of a root: a path, `~/...`, or `package:NAME/FOLDER`.

    `package:skimage/data` is a folder in an installed Python package. The package is not imported.

    Raises:
        ValueError: The package is not installed.
    """
    if not root.startswith(PACKAGE_PREFIX):
        return Path(os.path.expanduser(root))
    name, _, folder = root.removeprefix(PACKAGE_PREFIX).partition("/")
    # find_spec would import the parent of a dotted name
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
    """Open the images of a root that match the patterns.

    Args:
        root: a folder of images or `.tar` files, a `.tar` file, or a pattern of `.tar` files (see
            `expand_pattern`). `~/...` and `package:NAME/...` are resolved by `resolve_root`.
        channels: C.
        include: patterns of image paths, or of member names in shards; see `select`.
        exclude: patterns to exclude. Patterns that end in `.tar` exclude shards of a folder.
        max_pixels: maximum number of pixels, checked before decoding.

    Raises:
        ValueError: The root does not exist, has no matching image, contains both images and
            shards, or has a shard that cannot be read.
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
    """Return whether a file name has the extension of a tar shard."""
    return os.fspath(path).lower().endswith(SHARD_EXTENSIONS)


def _shards_of(
    listing: Listing, root: Path, channels: int, include: Sequence[str], exclude: Sequence[str]
) -> list[Path]:
    """Return the shards of a folder; empty if it has none.

    Raises:
        ValueError: The folder contains both shards and images, or only compressed shards.
    """
    kinds = listing.kinds
    images = [extension for extension in image_extensions(channels, include) if extension in kinds]
    compressed = [kind for kind in _COMPRESSED if kind in kinds]
    if not kinds.keys() & set(SHARD_EXTENSIONS):
        if compressed and not images:
            raise ValueError(
                f"no images in {display_name(root)}; compressed shards ({compressed[0]}) do not "
                "support random access: decompress them"
            )
        return []
    of_shards = [pattern for pattern in exclude if pattern.lower().endswith(SHARD_EXTENSIONS)]
    shards = select(filter(is_shard, listing.files), (), of_shards)
    if shards and images:
        image = next(path for path in listing.files if path.lower().endswith(tuple(images)))
        raise ValueError(
            f"{display_name(root)} contains both shards, such as {display_name(shards[0])}, and "
            f"images, such as {display_name(image)}: use separate folders, give the shards as a "
            "pattern ('FOLDER/*.tar'), or exclude them with exclude='*.tar'"
        )
    others = [path for path in listing.files if not is_shard(path)]
    report_skipped(select(others, include, exclude), display_name(root))
    return [root / shard for shard in shards]


# --- patterns


def _is_pattern(root: str) -> bool:
    """Return whether a root is a pattern; the name of an existing file or folder is not."""
    return any(sign in root for sign in "*?[{") and not os.path.lexists(root)


def expand_pattern(pattern: str) -> list[Path]:
    """Return the shards that a pattern matches, without duplicates, sorted by path bytes.

    `{0000..0127}` expands to a range of zero-padded numbers and `{a,b}` to alternatives, as in a
    shell. `*`, `?` and `[...]` match existing files.

    Raises:
        ValueError: A shard does not exist, nothing matches, or a match is not a `.tar` file.
    """
    paths: set[str] = set()
    missing: list[str] = []
    for number, name in enumerate(_expand_braces(pattern)):
        if number >= MAX_SHARDS:
            raise ValueError(
                f"{display_name(pattern)}: expands to more than {MAX_SHARDS:,} files; use a "
                "narrower pattern"
            )
        found = [name] if os.path.exists(name) else glob.glob(name) * glob.has_magic(name)
        paths.update(found)
        missing += [name] * (not found)
    if missing:
        others = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{display_name(pattern)}: no such file: {display_name(missing[0])}{others}; "
            "give existing shards"
        )
    shards = sorted(paths, key=name_bytes)
    for path in shards:
        if os.path.isdir(path) or not is_shard(path):
            raise ValueError(
                f"{display_name(pattern)}: {display_name(path)} is not a .tar file; patterns match "
                "shards only, give a folder of images by its path"
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
