"""Whether the process of a run is still there, as far as its lock and its files tell."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

from kl_vae.checkpoints.run_directory import LOCK

# C's struct flock of 64-bit systems: Linux has type, whence, start, length, pid
_LAYOUTS = {"linux": ("hhqqi", 0), "darwin": ("qqihh", 3)}  # and where the type stands

LOCKLESS_SECONDS = 60.0  # of silence without a lock, after which a run is lost
SILENT_SECONDS = 1800.0  # of silence that is worth a word


def is_locked(run: Path) -> bool | None:
    """Whether a process holds the lock of a run; None where that cannot be told.

    The lock is only asked for, never taken, so that a run that starts meanwhile is not refused.
    POSIX locks are a process's own: in the process that trains the answer is no.
    """
    layout, place = _LAYOUTS.get(sys.platform, ("", 0))
    if not layout or struct.calcsize("P") != 8:
        return None
    import fcntl

    fields = [0] * 5
    fields[place] = fcntl.F_WRLCK
    try:
        descriptor = os.open(run / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(layout, *fields))
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return bool(struct.unpack_from(layout, answer)[place] != fcntl.F_UNLCK)


def describe_silence(locked: bool | None, seconds: float) -> tuple[bool, str]:
    """Whether a run that says it is running is lost, and a sentence on it, which may be empty.

    Args:
        locked: what `is_locked` says.
        seconds: since the run wrote something.
    """
    if locked is False and seconds > LOCKLESS_SECONDS:
        return True, (
            f"nothing written for {duration(seconds)}, and no process holds its lock: killed, or "
            "its machine was lost (or it is on a machine whose locks are not seen from here)"
        )
    if locked is None and seconds > SILENT_SECONDS:
        return True, (
            f"nothing written for {duration(seconds)}: killed, or its machine was lost; whether a "
            "process holds its lock cannot be told here"
        )
    if locked and seconds > SILENT_SECONDS:
        return False, (
            f"its process is there, but nothing was written for {duration(seconds)}: a long "
            "validation, or it hangs"
        )
    return False, ""


def duration(seconds: float) -> str:
    """Such as "42 s", "3 min 05 s", "2 h 10 min" or "3 d 4 h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
