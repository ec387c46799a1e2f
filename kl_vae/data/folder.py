"""List the images of a folder, the same on every machine."""

import fnmatch
import importlib.util
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from kl_vae.data.images import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS, display_name
from kl_vae.data.pil_modes import MODE_BY_CHANNELS

PACKAGE_PREFIX = "package:"
# what `pip install` needs for the packages whose images the examples use
INSTALL_NAMES = {"skimage": "'kl-vae[demo]'"}


def resolve_root(root: str) -> Path:
    """Return the folder that `root` names: a path, `~/...`, or `package:NAME/FOLDER`.

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
    if not os.path.isdir(root):  # root.is_dir() raises where a parent may not be read
        problem = "not a folder" if os.path.exists(root) else "no such folder"
        raise ValueError(f"{problem}: {display_name(root)}; give an existing folder of images")
    of_arrays = any(pattern.lower().endswith(ARRAY_EXTENSIONS) for pattern in include)
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS if channels in MODE_BY_CHANNELS else ()
    if of_arrays or not extensions:
        extensions += ARRAY_EXTENSIONS
    files = _list_files(root)
    images = [path for path in files if os.path.splitext(path)[1].lower() in extensions]
    if not images:
        raise ValueError(
            f"no images in {display_name(root)}: looked for {', '.join(extensions)}"
            f"{_describe_others(files)}"
        )
    selected = select(images, include, exclude)
    if not selected:
        raise ValueError(
            f"include={list(include)} and exclude={list(exclude)} leave none of the "
            f"{len(images)} images in {display_name(root)}: change the patterns"
        )
    return sorted(selected, key=name_bytes)


def select(paths: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Keep the paths that match a pattern of `include`, if it has any, and none of `exclude`.

    Patterns are those of `fnmatch` over the relative path, where `*` crosses
    `/`; a pattern without `/` matches the file's name in any folder, too.
    """
    included, excluded = _matcher(include or ["*"]), _matcher(exclude)
    return [path for path in paths if included(path) and not excluded(path)]


def name_bytes(path: str) -> bytes:
    """Return the bytes of a file's name; unlike `os.fsencode`, whatever the locale."""
    return path.encode("utf-8", "surrogateescape")


def _list_files(root: Path) -> list[str]:
    """List what is neither a folder nor hidden, as relative POSIX paths in no particular order."""
    files: list[str] = []
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
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    path = folder + entry.name
                    linked = entry.is_symlink()
                    # os.path for links: of one that leads to itself, entry.is_dir() is an error
                    if os.path.isdir(entry) if linked else entry.is_dir():
                        # links last, so that a real folder is listed by its own name
                        (pending.append if linked else pending.appendleft)(f"{path}/")
                    else:
                        files.append(path)
        except OSError as error:
            raise ValueError(
                f"cannot read the folder {display_name(os.path.join(root, folder))} "
                f"({error.strerror}): make it readable, or give another folder"
            ) from error
    return files


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    whole = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
    names = [re.compile(fnmatch.translate(pattern)) for pattern in patterns if "/" not in pattern]

    def matches(path: str) -> bool:
        name = path.rpartition("/")[2]
        return any(p.match(path) for p in whole) or any(p.match(name) for p in names)

    return matches


def _describe_others(files: Sequence[str]) -> str:
    kinds = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in files)
    most = ", ".join(f"{count} {display_name(kind)}" for kind, count in kinds.most_common(3))
    return f"; it holds {len(files)} other files ({most})" if files else "; it holds no files"
