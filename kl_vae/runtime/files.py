"""Atomic writes of files and folders, checksums, and printable names."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from kl_vae.runtime.locks import lock_temporary, temporary_lock

logger = logging.getLogger(__name__)

_FLUSHES = 8
_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.4)
# errors of systems that do not open folders (as Windows), or of file systems that do not flush them
_NO_FLUSH = (
    *(errno.EACCES, errno.EPERM, errno.EISDIR),
    *(errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF),
)
_TEMPORARY = re.compile(r"\.\d+\.tmp")


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, durable: bool = True
) -> None:
    """Write a file so that `path` holds either the new content or the old.

    It is written to a temporary file and renamed; on failure the temporary file is removed.

    Args:
        path: the file; its folder exists.
        write: called with the open file.
        durable: wait until file and rename are on disk, so that they survive a power loss.

    Raises:
        OSError: the file cannot be written.
    """
    temporary, file = _open_temporary(path.parent)
    try:
        with file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        flush_folder(path.parent)  # the rename itself


def _open_temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """Create a temporary file, locked until it is closed."""
    while True:
        # short: the final name may be as long as names get; of no other process on any machine
        path = folder / f".{secrets.randbits(63)}.tmp"
        file = open(path, "xb")
        if lock_temporary(file.fileno(), path):
            return path, file
        file.close()  # `remove_temporaries` of another process was faster


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder.

    Those that another process is writing are kept. Where there are no locks, no other process may
    write into the folder meanwhile.
    """
    for path in folder.glob(".*.tmp"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        with suppress(OSError):  # another process removes it as well
            if path.is_symlink():
                path.unlink()
                continue
            with temporary_lock(path) as unused:
                if unused:
                    _remove(path)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for text, as UTF-8; names of files in it keep their bytes."""
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_folder_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Make a folder so that `path` is either complete or unchanged.

    Args:
        path: the folder; it does not exist, or is empty, which counts as not existing.
        write: called with a folder beside it, which is then renamed.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp")
    _remove(temporary)  # of a killed process: in a container process ids repeat
    try:
        temporary.mkdir()
        with temporary_lock(temporary):
            write(temporary)
            for file in temporary.iterdir():
                flush_file(file)
            flush_folder(temporary)
            with suppress(FileNotFoundError):
                path.rmdir()  # Windows replaces no folder, not even an empty one
            _replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    flush_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _replace(temporary: Path, path: Path) -> None:
    """Rename a file or folder, replacing `path`.

    Windows refuses it while another process reads one of the two, such as a report of the run or a
    virus scanner; it is tried again for about a second.
    """
    for seconds in _RETRY_SECONDS:
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(temporary, path)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk, where system and file system can.

    Raises:
        OSError: the folder is missing, or cannot be written to disk.
    """
    try:
        _flush(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FLUSH or not path.is_dir():
            raise
        _log_no_flush(error.strerror)


@cache
def _log_no_flush(reason: str) -> None:
    logger.debug("folders are not flushed, so that a power loss may undo a rename: %s", reason)


def flush_files(paths: Iterable[Path], root: Path) -> None:
    """Wait until files in a folder `root`, and their names, are on disk.

    Raises:
        OSError: a file is missing, or cannot be written to disk.
    """
    paths = list(paths)
    folders = {folder for path in paths for folder in path.parents if folder.is_relative_to(root)}
    with ThreadPoolExecutor(_FLUSHES) as pool:  # a disk writes several at once
        list(pool.map(flush_file, paths))
        list(pool.map(flush_folder, sorted(folders)))


def flush_file(path: Path) -> None:
    """Wait until a file is on disk.

    Raises:
        OSError: the file is missing, or cannot be written to disk.
    """
    # Windows flushes only files that are open for writing
    _flush(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """Context manager that yields a UTF-8 name of a file, for libraries that accept no other.

    Raises:
        ValueError: the name is not UTF-8, and this system has no other name for an open file.
    """
    if os.fsencode(path).decode(errors="replace") == str(path):
        yield str(path)
        return
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        raise ValueError(f"{path}: its name is not UTF-8; rename it")
    with open(path, "rb") as file:
        yield str(open_files / str(file.fileno()))


def display_name(path: str | os.PathLike[str]) -> str:
    """Return a path as text on one line, for any bytes in the name."""
    name = os.fspath(path)
    with suppress(UnicodeEncodeError):  # a surrogate that stands for no byte, as JSON may state
        name = os.fsencode(name).decode(errors="backslashreplace")
    return name if name.isprintable() else name.encode("unicode_escape").decode()
