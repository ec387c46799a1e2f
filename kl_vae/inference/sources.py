"""Which images a command was asked for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kl_vae.data import list_images, resolve_root


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
