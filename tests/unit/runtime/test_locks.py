"""Locks between processes, and temporary files that a process still writes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kl_vae.runtime import locks
from kl_vae.runtime.files import remove_temporaries, write_atomically, write_folder_atomically
from kl_vae.runtime.locks import hold_lock, is_locked
from tests.messages import is_about

HOLD = """
import sys, time
from pathlib import Path
from kl_vae.runtime.locks import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
WRITE = """
import sys
from pathlib import Path
from kl_vae.runtime.files import write_atomically, write_folder_atomically
def wait(*_):
    print("writing", flush=True)
    sys.stdin.read()
{}(Path(sys.argv[1]), wait)
"""


@contextmanager
def running(code: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, path], text=True, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with running(HOLD, lock) as first:
        with pytest.raises(BlockingIOError), hold_lock(lock):
            pass
        assert lock.exists()
        first.kill()
        first.wait()
    with hold_lock(lock):  # the file is left, without a lock
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("system", ["POSIX", "Windows"])
def test_a_link_in_the_place_of_a_lock_is_not_followed(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system == "Windows":
        monkeypatch.delattr(os, "O_NOFOLLOW")
    (tmp_path / ".lock").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic links"), hold_lock(tmp_path / ".lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_can_be_queried_without_taking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".lock"
    assert is_locked(lock) is None
    with running(HOLD, lock):
        assert is_locked(lock) is True
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    assert is_locked(lock) is False
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
    monkeypatch.setattr(locks, "fcntl", None)
    assert is_locked(lock) is None


@pytest.mark.parametrize("missing", ["system", "file system"])
def test_without_locks_a_log_line_says_so(
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "system":
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "lockf", refuse)
        monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.DEBUG):
        with hold_lock(tmp_path / ".lock"), hold_lock(tmp_path / ".lock"):
            assert (tmp_path / ".lock").exists()
        write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "DEBUG"]
    assert is_about(caplog.messages[0], tmp_path / ".lock", "locked", missing)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("write", [write_atomically, write_folder_atomically])
def test_temporaries_of_a_living_process_are_kept(write: object, tmp_path: Path) -> None:
    code = WRITE.format(write.__name__)  # type: ignore[attr-defined]
    with running(code, tmp_path / "result") as process:
        remove_temporaries(tmp_path)
        (temporary,) = tmp_path.iterdir()
        process.kill()
        process.wait()
    assert temporary.exists()
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []
