"""Commands that are disturbed at any moment, and file systems that lose what was not flushed.

torch is imported once, by multiprocessing's fork server; each command is a process forked from it.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 120.0  # a command takes one, but on a busy machine many
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Moment:
    """When a command is disturbed, and how.

    Args:
        disturbance: a signal, or the error of all later writes.
        operation: before this operation on its output, counted from 0.
        seconds: instead, after its start; a signal only.
    """

    disturbance: signal.Signals | OSError
    operation: int | None = None
    seconds: float | None = None


KILL, CTRL_C, DISK_FULL = signal.SIGKILL, signal.SIGINT, OSError(errno.ENOSPC, "disk full")


@dataclass(frozen=True)
class Outcome:
    """Of a command: its exit code, negative if a signal ended it, and what it took."""

    code: int
    seconds: float
    operations: int  # on its output


def run_command(
    arguments: list[str], folder: Path, moment: Moment | None = None, disk: Path | None = None
) -> Outcome:
    """Run `kl-vae ARGUMENTS` in a folder; its messages are added to FOLDER.log.

    Args:
        arguments: of `kl-vae`.
        folder: the working directory.
        moment: when it is disturbed, unless it ends before.
        disk: a folder that receives what is flushed, for `lose_power`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.interruptions", "kl_vae.training.loop"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_command, args=(arguments, folder, moment, disk, sender))
    process.start()
    sender.close()
    assert receiver.poll(PATIENCE_SECONDS) and receiver.recv() == "ready"
    start = time.monotonic()
    if moment is not None and moment.seconds is not None:
        assert isinstance(moment.disturbance, signal.Signals) and process.pid is not None
        process.join(moment.seconds)
        if process.exitcode is None:
            os.kill(process.pid, moment.disturbance)
    process.join(PATIENCE_SECONDS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{arguments} does not end")
    seconds = time.monotonic() - start
    return Outcome(process.exitcode, seconds, receiver.recv() if process.exitcode == 0 else 0)


def _command(
    arguments: list[str], folder: Path, moment: Moment | None, disk: Path | None, sender: Any
) -> None:
    import torch

    from kl_vae.cli.main import main

    os.chdir(folder)
    log = os.open(folder.with_name(f"{folder.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    watch = _Watch(Path.cwd(), moment, None if disk is None else _Disk(disk))
    watch.start()
    sender.send("ready")
    code = main(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python itself is not ready for it at its exit
    sender.send(watch.operations)
    sys.exit(code)


class _Watch:
    """Counts the operations on the files below a folder, and disturbs one of them."""

    def __init__(self, folder: Path, moment: Moment | None, disk: _Disk | None) -> None:
        self._folder = str(folder) + os.sep
        self._moment = moment
        self._disk = disk
        self.operations = 0

    def start(self) -> None:
        fsync = os.fsync

        def watched_fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._meet(path, needs_space=True)
            fsync(descriptor)
            if self._disk is not None and (path + os.sep).startswith(self._folder):
                self._disk.flush(Path(path))

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in _CHANGES) and isinstance(
                arguments[0], (str, bytes, os.PathLike)
            ):
                path = os.path.abspath(os.fsdecode(arguments[0]))
                self._meet(path, needs_space=event in ("open", "os.mkdir"))

        if self._disk is not None:
            self._disk.flush_all(Path(self._folder))
        os.fsync = watched_fsync
        sys.addaudithook(audit)

    def _meet(self, path: str, needs_space: bool) -> None:
        if not path.startswith(self._folder):
            return
        self.operations += 1
        if self._moment is None or self._moment.operation is None:
            return
        disturbance = self._moment.disturbance
        if isinstance(disturbance, signal.Signals):
            if self.operations == self._moment.operation + 1:
                os.kill(os.getpid(), disturbance)
        elif self.operations > self._moment.operation and needs_space:
            raise disturbance


class _Disk:
    """What is flushed: the content of each file, and the entries of each folder, by inode.

    A link to each file keeps its inode, which another file could get otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def flush_all(self, folder: Path) -> None:
        for path in (folder, *folder.rglob("*")):
            self.flush(path)

    def flush(self, path: Path) -> None:
        """Copy a file, or the list of a folder's entries."""
        inode = path.stat().st_ino
        if path.is_dir():
            entries = {}
            for entry in path.iterdir():
                entries[entry.name] = entry.lstat().st_ino
                if entry.is_file():
                    self._keep(entry)
            _write(self._folder / f"{inode}.entries", json.dumps(entries).encode())
        else:
            self._keep(path)
            _write(self._folder / f"{inode}.content", path.read_bytes())

    def _keep(self, path: Path) -> None:
        link = self._folder / f"{path.stat().st_ino}.kept"
        if not link.exists():
            os.link(path, link)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".new")
    with open(temporary, "wb") as file:
        file.write(content)
    os.replace(temporary, path)


def lose_power(folder: Path, disk: Path, rng: random.Random) -> None:
    """Replace a folder by what a disk may hold of it when a killed command's machine loses power.

    What was flushed is there. Of everything else anything is possible: a folder has the entries
    that were flushed last, or the present ones; a file has the content that was flushed last, or a
    part of the present one, or nothing.
    """
    present = {path.stat().st_ino: path for path in (folder, *folder.rglob("*"))}
    lost = folder.with_name(f"{folder.name}.lost")
    folder.rename(lost)
    present = {inode: lost / path.relative_to(folder) for inode, path in present.items()}

    def restore(inode: int, target: Path) -> None:
        path = present.get(inode, disk / f"{inode}.kept")
        flushed = disk / f"{inode}.content"
        if path.exists() and stat.S_ISREG(path.lstat().st_mode):
            content = path.read_bytes()
            before = flushed.read_bytes() if flushed.exists() else b""
            if content != before:
                shared = len(before) if content.startswith(before) else 0
                content = rng.choice([before, content[: rng.randint(shared, len(content))]])
            target.write_bytes(content)
            return
        target.mkdir()
        listed = disk / f"{inode}.entries"
        entries = json.loads(listed.read_text()) if listed.exists() else {}
        if path.exists():
            now = {entry.name: entry.lstat().st_ino for entry in path.iterdir()}
            entries = rng.choice([entries, now])
        for name in sorted(entries):
            restore(entries[name], target / name)

    restore(lost.stat().st_ino, folder)
    shutil.rmtree(lost)
    shutil.rmtree(disk)
