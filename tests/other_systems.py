"""Run commands of kl-vae as on another system: `other_systems.py SYSTEM COMMANDS.json`.

SYSTEM is one of

- windows: without POSIX locks, limits, signals and forks; folders cannot be opened, files that are
  open cannot be replaced, text has \\r\\n and a code page unless told otherwise, clocks are coarse,
  and there is no /proc.
- network: a file system on which folders cannot be flushed.

Data workers, which are started as new processes, import this file, too.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.utils.data._utils.signal_handling as worker_signals

NO_FUNCTIONS = (
    *("fork", "forkpty", "pread", "preadv", "pwrite", "sched_getaffinity", "mkfifo", "mknod"),
    *("chown", "fchmod", "fchown", "lchown", "getuid", "geteuid", "getgid", "getegid", "killpg"),
    *("getpgid", "setsid", "sync", "fdatasync", "posix_fadvise", "statvfs", "fstatvfs", "uname"),
    *("getloadavg", "sysconf", "nice", "fchdir", "sendfile"),
    *("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC", "O_SYNC", "O_NOCTTY"),
)
NO_SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGCHLD", "SIGALRM", "SIGPIPE", "SIGQUIT")
TICK = 1 / 64  # of time.monotonic, in seconds
NO_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "syslog")


def as_on_windows() -> None:
    """Take away what Windows lacks, once the libraries that are made for Linux are imported."""
    for name in NO_FUNCTIONS:
        if hasattr(os, name):
            delattr(os, name)
    for name in NO_SIGNALS:
        delattr(signal, name)
    for name in NO_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails
    worker_signals.IS_WINDOWS = True
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    multiprocessing.set_start_method("spawn", force=True)

    plain_open = os.open

    def open_descriptor(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return plain_open(path, flags, *rest, **named)

    plain_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        with plain_file(f"/proc/self/fdinfo/{descriptor}") as file:
            flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
        if not flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EBADF, "Bad file descriptor")
        plain_fsync(descriptor)

    def check_closed(path: Any) -> None:
        name = os.path.realpath(path)
        with plain_file("/proc/self/maps") as file:
            used = {line.rstrip("\n").partition("/")[2] for line in file}
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        used |= {os.readlink(link)[1:] for link in links if os.path.lexists(link)}
        if name[1:] in used:
            raise PermissionError(errno.EACCES, "is being used by another process", name)

    plain_replace, plain_unlink = os.replace, os.unlink

    def replace(source: Any, target: Any, **named: Any) -> None:
        check_closed(source)
        check_closed(target)
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "Access is denied", os.fspath(target))
        plain_replace(source, target, **named)

    def unlink(path: Any, **named: Any) -> None:
        check_closed(path)
        plain_unlink(path, **named)

    plain_file = io.open

    def open_file(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        **named: Any,
    ) -> Any:
        if str(file).startswith(("/proc/", "/sys/", "/dev/shm/")):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", file)
        if "b" not in mode:
            encoding = encoding or "cp1252"
            newline = "\r\n" if newline is None and "r" not in mode else newline
        return plain_file(file, mode, buffering, encoding, errors, newline, **named)

    os.open, os.fsync, os.replace, os.rename = open_descriptor, fsync, replace, replace
    os.unlink = os.remove = unlink
    io.open = builtins.open = open_file

    plain_monotonic = time.monotonic
    time.monotonic = lambda: plain_monotonic() // TICK * TICK


def as_on_a_network_drive() -> None:
    """Refuse to flush folders."""
    plain_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        plain_fsync(descriptor)

    os.fsync = fsync


{"windows": as_on_windows, "network": as_on_a_network_drive}[sys.argv[1]]()

if __name__ == "__main__":
    from kl_vae.cli.main import main

    torch.set_num_threads(1)
    for command in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        code = main(command)
        if code:
            sys.exit(f"exit code {code}: {command}")
