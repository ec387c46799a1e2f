"""Locks between processes, where the system and the file system have them."""

from __future__ import annotations

import errno
import logging
import os
import struct
import sys
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

# C's struct flock of 64-bit systems: Linux has type, whence, start, length, pid
_LAYOUTS = {"linux": ("hhqqi", 0), "darwin": ("qqihh", 3)}  # and the position of the type


def lock_file(path: Path) -> int:
    """Create a lock file, unless it exists, and lock it for this process.

    The lock belongs to the process, not to the open file: data workers do not inherit it. A
    symbolic link is not followed. Where there are no locks, a log line says so.

    Returns:
        Its file descriptor; closing it releases the lock.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be created.
    """
    if path.is_symlink():  # where there is no O_NOFOLLOW
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
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


def is_locked(path: Path) -> bool | None:
    """Return whether another process holds the lock of a file; None where that is unknown.

    The lock is only queried, never taken, so that a process that starts meanwhile is not refused.
    """
    layout, place = _LAYOUTS.get(sys.platform, ("", 0))
    if fcntl is None or not layout or struct.calcsize("P") != 8:
        return None
    fields = [0] * 5
    fields[place] = fcntl.F_WRLCK
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(layout, *fields))
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return bool(struct.unpack_from(layout, answer)[place] != fcntl.F_UNLCK)


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

    It yields True where there are no locks, or folders cannot be opened.

    Raises:
        OSError: it cannot be opened.
    """
    if fcntl is None:
        yield True  # Windows does not remove open files
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except PermissionError:
        if not path.is_dir():
            raise
        yield True
        return
    try:
        yield lock_temporary(descriptor, path)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path, *, of_process: bool) -> None:
    """Lock an open file without waiting; where there are no locks, log it.

    Args:
        descriptor: of the file; `of_process` needs one that can be written to.
        path: of the file.
        of_process: the lock belongs to the process, not to the open file.

    Raises:
        BlockingIOError: it is locked already.
    """
    # the user has to know that a second process in a folder is not refused
    level = logging.INFO if of_process else logging.DEBUG
    text = "%s: cannot be locked, so that a second process is not detected: %s"
    if fcntl is None:
        logger.log(level, text, path, "this system has no POSIX locks")
        return
    lock = fcntl.lockf if of_process else fcntl.flock
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise BlockingIOError(error.errno, error.strerror, str(path)) from None
        logger.log(level, text, path, f"its file system has no locks ({error.strerror})")
