"""The fingerprint of a folder's files."""

import os
from pathlib import Path

from kl_vae.data import fingerprint, open_root


def test_fingerprint_depends_on_names_sizes_and_order(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"12")
    first = fingerprint(tmp_path, ["a", "b"])
    assert len(first) == 32
    assert first == fingerprint(tmp_path, ["a", "b"])
    others = {fingerprint(tmp_path, names) for names in (["b", "a"], ["a"], ["a", "c"], ["ab"][:0])}
    (tmp_path / "b").write_bytes(b"123")
    others.add(fingerprint(tmp_path, ["a", "b"]))
    assert len(others) == 5
    assert first not in others


def test_fingerprint_of_files_that_have_no_size(tmp_path: Path) -> None:
    odd, empty = tmp_path / "odd", tmp_path / "empty"
    (odd / "folder").mkdir(parents=True)
    empty.mkdir()
    os.mkfifo(odd / "pipe")
    (odd / "loop").symlink_to(odd / "loop")
    for name in ("folder", "pipe", "loop", "gone"):
        (empty / name).touch()
        assert fingerprint(odd, [name]) == fingerprint(tmp_path / "nowhere", [name])
        assert fingerprint(odd, [name]) != fingerprint(empty, [name])


def test_a_listed_folder_has_the_fingerprint_of_its_files_now(tmp_path: Path) -> None:
    for number, name in enumerate(["a/1.png", "b/c/3.png", "é.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1" * number)
    (tmp_path / "gone.png").symlink_to("nowhere")
    for size in (2, 5):
        (tmp_path / "b" / "c" / "3.png").write_bytes(b"1" * size)  # in its place
        source = open_root(str(tmp_path), 3)
        assert source.fingerprint == fingerprint(tmp_path, list(source.keys))
