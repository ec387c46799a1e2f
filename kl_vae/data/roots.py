"""Open what a root names: a folder of images, tar shards in a folder, one shard, or a pattern."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from kl_vae.data.folder import image_extensions, images_of, scan_root, select
from kl_vae.data.images import MAX_PIXELS
from kl_vae.data.scan import SHARD_EXTENSIONS, Scan
from kl_vae.data.shard_patterns import expand_pattern, is_pattern, is_shard
from kl_vae.data.source import FolderSource, StoredSource
from kl_vae.data.tar_shards import open_shards
from kl_vae.runtime.files import display_name

PACKAGE_PREFIX = "package:"
# what `pip install` needs for the packages whose images the examples use
INSTALL_NAMES = {"skimage": "'kl-vae[demo]'"}
# how shards end that cannot be read at random
_COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")


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
    cache: bool = True,
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
        cache: whether the list of images may be taken from the cache, and kept there.

    Raises:
        ValueError: there is no such root, no image in it, images and shards are mixed, or a shard
            cannot be read.
    """
    path = resolve_root(root)
    how = (channels, include, exclude, max_pixels, cache)
    if is_pattern(str(path)):
        return open_shards(expand_pattern(str(path)), *how)
    if is_shard(path) and not os.path.isdir(path):
        return open_shards([path], *how)
    scan = scan_root(path, cache)
    shards = _shards_of(scan, path, channels, include, exclude)
    if shards:
        return open_shards([path / shard for shard in shards], *how)
    paths, sizes = images_of(scan, path, channels, include, exclude)
    return FolderSource(path, paths, channels, max_pixels, sizes)


def _shards_of(
    scan: Scan, root: Path, channels: int, include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Return a folder's shards; none where it holds images.

    Raises:
        ValueError: it holds both, or nothing but compressed shards.
    """
    extensions = image_extensions(channels, include)
    images = [extension for extension in extensions if extension in scan.kinds]
    compressed = [kind for kind in _COMPRESSED if kind in scan.kinds]
    if not any(kind in scan.kinds for kind in SHARD_EXTENSIONS):
        if compressed and not images:
            raise ValueError(
                f"no images in {display_name(root)}, and its {compressed[0]} files are compressed: "
                "were they shards, images could be read one after the other only; decompress them"
            )
        return []
    of_shards = [pattern for pattern in exclude if pattern.lower().endswith(SHARD_EXTENSIONS)]
    shards = select([path for path in scan.files if is_shard(path)], (), of_shards)
    if shards and images:
        image = next(path for path in scan.files if path.lower().endswith(tuple(images)))
        raise ValueError(
            f"{display_name(root)} holds shards, such as {display_name(shards[0])}, beside images, "
            f"such as {display_name(image)}: move either into a folder of its own, give the shards "
            "as a pattern ('FOLDER/*.tar'), or leave them out with exclude='*.tar'"
        )
    return shards
