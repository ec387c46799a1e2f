"""Files and folders are written whole or not at all."""

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from kl_vae.runtime.files import (
    display_name,
    flush_file,
    flush_folder,
    remove_temporaries,
    write_atomically,
    write_folder_atomically,
    write_text_atomically,
)


def test_a_failed_write_keeps_the_file_and_leaves_no_temporary(tmp_path: Path) -> None:
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


def test_temporary_folders_are_removed_as_well(tmp_path: Path) -> None:
    """Of a process that was killed while it wrote one into a run directory."""
    (tmp_path / ".123.tmp").mkdir()
    (tmp_path / ".123.tmp" / "config.json").touch()
    (tmp_path / ".124.tmp").symlink_to(tmp_path.parent)
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert tmp_path.is_dir()


def two_files(folder: Path) -> None:
    (folder / "one").write_text("1")
    (folder / "two").write_text("22")


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_is_written_atomically(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "a" / "folder"
    if exists:
        path.mkdir(parents=True)
    write_folder_atomically(path, two_files)
    assert {file.name: file.read_text() for file in path.iterdir()} == {"one": "1", "two": "22"}
    assert list(path.parent.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert path.stat().st_mode == plain.stat().st_mode  # others may read it as well


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("no")])
def test_a_failed_write_of_a_folder_changes_nothing(
    tmp_path: Path, exists: bool, error: BaseException
) -> None:
    path = tmp_path / "folder"
    if exists:
        path.mkdir()

    def fail(folder: Path) -> None:
        two_files(folder)
        assert not exists or not list(path.iterdir())  # nothing is seen before all of it is
        raise error

    with pytest.raises(type(error)):
        write_folder_atomically(path, fail)
    assert list(tmp_path.rglob("*")) == ([path] if exists else [])


def test_neither_a_file_nor_a_full_folder_is_replaced(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("before")
    folder.mkdir()
    (folder / "inner").write_text("before")
    for path in (file, folder, file / "folder"):
        with pytest.raises(OSError):
            write_folder_atomically(path, two_files)
    assert file.read_text() == (folder / "inner").read_text() == "before"
    assert sorted(tmp_path.rglob("*")) == [file, folder, folder / "inner"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_temporary_files_of_a_killed_process_with_the_same_pid(tmp_path: Path, kind: str) -> None:
    """In a container each process may be number 1."""
    left = tmp_path / f".{os.getpid()}.tmp"
    if kind == "folder":
        left.mkdir()
        (left / "half").touch()
    else:
        left.touch()
    write_folder_atomically(tmp_path / "folder", two_files)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "one", "two"]


def test_a_folder_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, its entries, then the rename and the entries of the folder above."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        done.append("rename")
        assert Path(source).parent == tmp_path  # a rename across file systems is a copy
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_folder_atomically(tmp_path / "folder", two_files)
    temporary = f".{os.getpid()}.tmp"
    assert sorted(done[:2]) == [f"{temporary}/one", f"{temporary}/two"]
    assert done[2:] == [temporary, "rename", "."]


NO_FLUSH = [errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ENOTSUP, errno.EBADF]


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("number", [*NO_FLUSH, errno.EIO, errno.ENOSPC])
def test_only_a_folder_that_cannot_be_flushed_is_left_alone(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EACCES: Windows. EINVAL, ENOTSUP: network file systems. EIO: the disk failed."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError):
            flush_file(path)
        with pytest.raises(OSError):
            flush_folder(path)
        if number in NO_FLUSH:
            flush_folder(tmp_path)
        else:
            with pytest.raises(OSError):
                flush_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush_folder(tmp_path / "gone")


def test_files_are_flushed_by_a_descriptor_that_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows flushes no other; a file that may not be written is flushed where that is enough."""
    path = tmp_path / "file"
    path.touch()
    flags = []
    plain_open = os.open

    def note_open(path: Path, flag: int) -> int:
        flags.append(flag)
        return plain_open(path, flag)

    monkeypatch.setattr(os, "open", note_open)
    flush_file(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    flush_file(path)
    assert flags == [os.O_RDWR, os.O_RDONLY]


@pytest.mark.parametrize("refusals", [1, 4, 100])
def test_a_file_that_another_process_reads_is_replaced_when_it_is_closed(
    refusals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows has it."""
    left = refusals
    plain_replace = os.replace

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise PermissionError(errno.EACCES, "Access is denied")
        plain_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    path = tmp_path / "file"
    path.write_text("before")
    if refusals < 100:
        write_text_atomically(path, "after")
        assert path.read_text() == "after"
    else:
        with pytest.raises(PermissionError):
            write_text_atomically(path, "after")
        assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_written_where_none_can_be_opened_or_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_open, plain_replace = os.open, os.replace

    def open_file(path: Path, flags: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain_open(path, flags)

    def replace(source: Path, target: Path) -> None:
        if target.is_dir():
            raise PermissionError(errno.EACCES, "Access is denied")
        plain_replace(source, target)

    path = tmp_path / "folder"
    path.mkdir()
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "replace", replace)
    write_folder_atomically(path, two_files)
    assert {file.name for file in path.iterdir()} == {"one", "two"}


def test_paths_of_any_characters_are_printable() -> None:
    assert display_name("a/é.png") == "a/é.png"
    assert display_name(os.fsdecode(b"a\xff.png")) == "a\\xff.png"
    assert display_name("a\ud800.png") == "a\\ud800.png"  # no byte, but JSON can state it
