"""One process at a time in a run's directory."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
from kl_vae.training.run_lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from kl_vae.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.acquire()
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    first = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with RunLock(run) as lock:
        with pytest.raises(ValueError, match="runs/a: another process trains in it; wait until it"):
            lock.acquire()
        first.kill()  # without a chance to let go
        first.communicate()
    with RunLock(run) as lock:
        lock.acquire()


def test_nothing_is_made_before_it_is_acquired(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        RunLock(tmp_path / "file" / "run") as lock,
        pytest.raises(ValueError, match=r"file/run: cannot be written .*choose another --run-dir"),
    ):
        lock.acquire()


def test_a_file_system_without_locks_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with RunLock(tmp_path / "run") as lock:
        lock.acquire()
