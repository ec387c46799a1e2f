"""Locks between processes, where the system and the file system have them."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_BUSY = (errno.EACCES, errno.EAGAIN)
_ATTEMPTS = 10


def lock_file(path: Path) -> int:
    """Create a lock file, unless it exists, and lock it for this process.

    The lock belongs to the process, not to the open file: data workers do not inherit it. A
    symbolic link is not followed.

    Returns:
        Its file descriptor; closing it releases the lock.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be created.
    """
    for _ in range(_ATTEMPTS):
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags, 0o644)
        try:
            _try_lock(descriptor, path, of_process=True)
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process that held the lock has removed the file meanwhile
    raise BlockingIOError(errno.EAGAIN, "is replaced all the time", str(path))


def remove_lock(descriptor: int, path: Path) -> None:
    """Remove a lock file, and release its lock."""
    if fcntl is None:
        os.close(descriptor)  # Windows does not remove open files
    with suppress(OSError):  # already removed, or the folder is read-only by now
        path.unlink()
    if fcntl is not None:
        os.close(descriptor)


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Context manager that holds the lock of a file, which it creates and removes.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be created.
    """
    descriptor = lock_file(path)
    try:
        yield
    finally:
        remove_lock(descriptor, path)


def lock_temporary(descriptor: int, path: Path) -> bool:
    """Lock a temporary file or folder until it is closed: it is in use.

    Returns:
        False if another process has locked it, or has removed it.
    """
    try:
        _try_lock(descriptor, path, of_process=False)
    except BlockingIOError:
        return False
    return os.path.lexists(path)


@contextmanager
def temporary_lock(path: Path) -> Iterator[bool]:
    """Context manager that yields `lock_temporary` of a file or folder that is not open.

    Raises:
        OSError: it cannot be opened.
    """
    if fcntl is None:
        yield True  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield lock_temporary(descriptor, path)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path, *, of_process: bool) -> None:
    """Lock an open file without waiting; where there are no locks, do nothing.

    Args:
        descriptor: of the file; `of_process` needs one that can be written to.
        path: of the file.
        of_process: the lock belongs to the process, not to the open file.

    Raises:
        BlockingIOError: it is locked already.
    """
    if fcntl is None:
        logger.debug("%s: not locked, since this system has no POSIX locks", path)
        return
    lock = fcntl.lockf if of_process else fcntl.flock
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise BlockingIOError(error.errno, error.strerror, str(path)) from None
        logger.debug("%s: not locked, since its file system has no locks (%s)", path, error)
