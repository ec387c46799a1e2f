"""Files are written whole or not at all."""

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from kl_vae.files import remove_temporaries, write_atomically, write_text_atomically


def test_a_failed_write_leaves_what_was_there_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "before")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    write_atomically(path, lambda file: file.write(b"after"), durable=durable)
    assert path.read_bytes() == b"after"


def test_a_file_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flushed, then renamed, then the folder: after a power cut there is one or the other."""
    path = tmp_path / "file"
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        synced = os.readlink(f"/proc/self/fd/{descriptor}")
        if synced == str(tmp_path):
            done.append("folder")
        else:
            done.append(f"file of {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        done.append("rename")
        assert Path(source).parent == tmp_path  # a rename across file systems is a copy
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_text_atomically(path, "after")
    assert done == ["file of 5 bytes", "rename", "folder"]


def test_temporaries_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".123.tmp", ".a.tmp", "123.tmp", ".123.tmp.png", "a.png"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".a.tmp", "123.tmp", ".123.tmp.png", "a.png"}
    remove_temporaries(tmp_path / "gone")
