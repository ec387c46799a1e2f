"""One process at a time in a run's directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType

from kl_vae.training.run_directory import unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class RunLock:
    """Keeps a second process out of a run's directory; gone with the process that holds it."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Make the directory and lock it, where its file system can.

        Raises:
            ValueError: another process holds it, or it cannot be written.
        """
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(self._run, error) from None
        if fcntl is None:
            return
        try:
            # of the process, not of the file: the data workers do not inherit it
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # this file system has no locks
            raise ValueError(
                f"{self._run}: another process trains in it; wait until it ends, or choose "
                "another --run-dir"
            ) from None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
