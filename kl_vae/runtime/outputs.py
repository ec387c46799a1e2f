"""Output paths that never overwrite an input."""

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import chain, count
from pathlib import Path, PurePosixPath

from kl_vae.runtime.files import display_name, write_atomically

MAX_NAME_BYTES = 255  # of nearly every file system
# members of tar files may have names that Windows takes for streams, folders or patterns
_REPLACED = str.maketrans(dict.fromkeys('<>:"|?*\\', "_") if os.name == "nt" else {})


def plan_outputs(
    relative_paths: Sequence[str], suffix: str = ".png", reserved: Iterable[str] = ()
) -> list[str]:
    """Return one output path for each input path, in their order; all are relative POSIX paths.

    The input's tree is kept and its suffix replaced: `a/b.jpg` becomes `a/b.png`. If that
    belongs to an earlier input, a folder or a reserved name, `a/b.jpg.png`, then `a/b.jpg.2.png` is
    used. Names that differ only in case or Unicode normalisation count as equal, as on some file
    systems. Names of files and folders that are too long, as members of tar files may be, are
    truncated; characters that names must not have on Windows become `_` there.

    Raises:
        ValueError: a folder has a reserved name.
    """
    relative_paths = [_with_short_folders(path.translate(_REPLACED)) for path in relative_paths]
    folders = {folder for path in relative_paths for folder in _folders(path)}
    taken = {_folded(name) for name in reserved}
    for folder in sorted(folders):
        if _folded(folder) in taken:
            raise ValueError(
                f"the image folder {display_name(folder)} has the name of a file of the output; "
                "rename it"
            )
    taken.update(map(_folded, folders))
    outputs = []
    for path in relative_paths:
        output = next(name for name in _candidates(path, suffix) if _folded(name) not in taken)
        taken.add(_folded(output))
        outputs.append(output)
    return outputs


def check_output_folder(out: Path, image_folders: Iterable[Path] = ()) -> None:
    """Check that `out` can be an output folder; nothing is written.

    Raises:
        ValueError: it is a file, or is one of the image folders, or lies in one.
    """
    # os.path throughout: of a folder that cannot be read pathlib's methods are an error
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"the output folder {display_name(out)} is a file; give a folder")
    check_outside(out, image_folders)


def check_outside(out: Path, image_folders: Iterable[Path]) -> None:
    """Check that an output folder is in none of the image folders.

    Raises:
        ValueError: it is.
    """
    folder = _containing(out, list(image_folders))
    if folder is not None:
        raise ValueError(
            f"the output folder {display_name(out)} is in the image folder "
            f"{display_name(folder)}, where its files would be read as images; "
            "give a folder outside of it"
        )


def check_outputs(
    out: Path,
    outputs: Iterable[str],
    inputs: Iterable[Path],
    earlier: Sequence[str],
    *,
    image_folders: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Check that the outputs stay in `out` and do not overwrite other files.

    Args:
        out: the output folder.
        outputs: paths relative to it.
        inputs: files that must not be overwritten.
        earlier: files of an earlier run of the command: if one is in `out`, its outputs may be
            replaced.
        image_folders: folders that must not be written to.
        overwrite: other files may be replaced as well.

    Raises:
        ValueError: an output is an input, a folder, outside, or in an image folder; or it is there
            without `earlier` or `overwrite`.
    """
    may_replace = overwrite or any(os.path.exists(out / file) for file in earlier)
    root = os.path.realpath(out)
    inside = cache(lambda folder: Path(os.path.realpath(folder)).is_relative_to(root))
    image_folder = cache(partial(_containing, folders=list(image_folders)))
    input_files = {(status.st_dev, status.st_ino) for status in map(_status, inputs) if status}
    for output in outputs:
        path = out / output
        name = display_name(path)
        if not inside(path.parent):
            raise ValueError(f"{name} leads out of the output folder; give an empty folder")
        folder = image_folder(path.parent)
        if folder is not None:
            raise ValueError(
                f"{name} would be written to the image folder {display_name(folder)}, and read as "
                "an image; give another output folder"
            )
        status = _status(path)
        if status is None:
            continue
        if (status.st_dev, status.st_ino) in input_files:
            raise ValueError(f"{name} is an image that would be overwritten; give another folder")
        if os.path.isdir(path):
            raise ValueError(f"{name} is a folder where a file would go; give an empty folder")
        if not may_replace:
            raise ValueError(
                f"{name} exists, and no {earlier[0]} of an earlier run; give an empty folder, or "
                "--overwrite to replace files"
            )


def make_folder(folder: Path) -> None:
    """Create a folder with its parents, unless it exists.

    Raises:
        ValueError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot create the folder {display_name(folder)} ({error.strerror}); give another"
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is created.

    Raises:
        ValueError: it cannot be written.
    """
    make_folder(path.parent)
    try:
        write_atomically(path, lambda file: file.write(content), durable=False)
    except OSError as error:
        raise ValueError(
            f"cannot write {display_name(path)} ({error.strerror}); "
            "make room and permission for it, or give another folder"
        ) from error


def _containing(path: Path, folders: Sequence[Path]) -> Path | None:
    """Return the first of the folders that is `path` or contains it; None: no folder does."""
    resolved = Path(os.path.realpath(path))
    existing = [folder for folder in (resolved, *resolved.parents) if os.path.exists(folder)]
    for folder in folders:
        if any(os.path.samefile(parent, folder) for parent in existing):
            return folder
    return None


def _candidates(path: str, suffix: str) -> Iterator[str]:
    folder, name = posixpath.split(path)
    first = [(posixpath.splitext(name)[0], suffix), (name, suffix)]
    for stem, ending in chain(first, ((name, f".{n}{suffix}") for n in count(2))):
        yield posixpath.join(folder, _truncated(stem, ending))


def _with_short_folders(path: str) -> str:
    *folders, name = path.split("/")
    return "/".join([*map(_truncated, folders), name])


def _truncated(stem: str, ending: str = "") -> str:
    while len(os.fsencode(stem + ending)) > MAX_NAME_BYTES:
        stem = stem[:-1]
    return stem + ending


def _folders(path: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(path).parents]


def _folded(path: str) -> str:
    # twice: folding case can undo the composition
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
