"""Which images a command was asked for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kl_vae.data import (
    MAX_PIXELS,
    FolderSource,
    JoinedSource,
    list_images,
    resolve_root,
)


class ImageSource(NamedTuple):
    """An image file; its tree below `root` is mirrored in the output."""

    root: Path
    relative: str  # POSIX path

    @property
    def path(self) -> Path:
        """The file."""
        return self.root / self.relative


def list_sources(
    roots: Sequence[str], channels: int, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[ImageSource], list[Path]]:
    """List the images of folders, in their order, and single files among them.

    Args:
        roots: folders, `package:NAME/FOLDER`, or files; files are taken whatever the patterns say.
        channels: the model's in_channels.
        include: patterns of the files to take; none: all.
        exclude: patterns of the files to leave out.

    Returns:
        The images, each once, and the folders among `roots`.

    Raises:
        ValueError: a folder does not exist, cannot be read, or holds no image.
    """
    sources: list[ImageSource] = []
    folders = []
    for root in map(resolve_root, roots):
        if os.path.lexists(root) and not os.path.isdir(root):  # a bad file is reported later
            sources.append(ImageSource(root.parent, root.name))
            continue
        sources += [
            ImageSource(root, name) for name in list_images(root, channels, include, exclude)
        ]
        folders.append(root)
    unique: dict[str, ImageSource] = {}
    for source in sources:
        unique.setdefault(os.path.abspath(source.path), source)
    return list(unique.values()), folders


def open_sources(
    roots: Sequence[str],
    channels: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> tuple[JoinedSource, list[Path]]:
    """Join the images of folders, in their order, and single files among them.

    Args:
        roots: folders, `package:NAME/FOLDER`, or files; files are taken whatever the patterns say.
        channels: the model's in_channels.
        include: patterns of the files to take; none: all.
        exclude: patterns of the files to leave out.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        The images, each once, and the folders among `roots`.

    Raises:
        ValueError: a folder does not exist, cannot be read, or holds no image.
    """
    seen: set[str] = set()
    parts, folders = [], []
    for root in map(resolve_root, roots):
        if os.path.lexists(root) and not os.path.isdir(root):  # a bad file is reported later
            root, paths = root.parent, [root.name]
        else:
            paths = list_images(root, channels, include, exclude)
            folders.append(root)
        if len(roots) > 1:
            absolute = {path: os.path.abspath(root / path) for path in paths}
            paths = [path for path in paths if absolute[path] not in seen]
            seen.update(absolute.values())
        if paths:
            parts.append(FolderSource(root, paths, channels, max_pixels))
    return JoinedSource(parts), folders
