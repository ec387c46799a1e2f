"""The files of each image."""

from __future__ import annotations

from pathlib import Path

import pytest

from kl_vae.data import FolderSource
from kl_vae.inference.reconstruction.output_files import OutputFiles
from kl_vae.visual.image_files import PNG, PictureFormat

NAMES = ["a.jpg", "a.png", "sub/b.webp"]


def test_files_of_pictures(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, NAMES, channels=3)
    files = OutputFiles.of(tmp_path / "out", source, PictureFormat("webp"), gallery=True)
    assert files.pictures == ("a.webp", "a.png.webp", "sub/b.webp")
    assert files.original(1) == "gallery/originals/a.png.png"
    assert files.thumbnail(2) == "gallery/thumbnails/sub/b.jpg"
    assert files.shown(2) == "sub/b.webp"


def test_arrays_are_shown_by_pictures_of_their_own(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, ["a.npy"], channels=5)
    files = OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    assert files.pictures == ("a.npy",)
    assert files.shown(0) == "gallery/reconstructions/a.png"


def test_a_folder_of_images_may_be_called_gallery(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, ["gallery/a.png", "index.html/a.png"], channels=3)
    message = "the image folder index.html has the name of a file of the output; rename it"
    with pytest.raises(ValueError, match=message):
        OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    names = ["gallery/a.png", "gallery/originals/a.png"]
    source = FolderSource(tmp_path, names[:1], channels=3)
    assert OutputFiles.of(tmp_path, source, PNG, gallery=True).pictures == ("gallery/a.png",)
    source = FolderSource(tmp_path, names, channels=3)
    assert OutputFiles.of(tmp_path, source, PNG, gallery=False).pictures == tuple(names)
    message = "the image folder gallery/originals has the name of a file of the output; rename it"
    with pytest.raises(ValueError, match=message):
        OutputFiles.of(tmp_path, source, PNG, gallery=True)


def test_nothing_of_somebody_else_is_replaced(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, NAMES, channels=3)
    files = OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    files.prepare(source)
    (tmp_path / "out/gallery/thumbnails/sub").mkdir(parents=True)
    somebodys = tmp_path / "out/gallery/thumbnails/sub/b.jpg"
    somebodys.touch()
    with pytest.raises(ValueError, match=r"sub/b\.jpg exists, and no metrics\.csv of an earlier"):
        files.prepare(source)
    OutputFiles.of(tmp_path / "out", source, PNG, gallery=False).prepare(source)
    somebodys.unlink()
    (tmp_path / "out" / "index.html").touch()
    with pytest.raises(ValueError, match=r"index\.html exists, and no metrics\.csv of an earlier"):
        files.prepare(source)


def test_what_a_killed_command_left_is_removed(tmp_path: Path) -> None:
    source = FolderSource(tmp_path, NAMES, channels=3)
    files = OutputFiles.of(tmp_path / "out", source, PNG, gallery=True)
    left = [tmp_path / "out" / name / ".123.tmp" for name in ("", "sub", "gallery/originals/sub")]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "out" / "a.png").touch()
    files.remove_temporaries()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "out" / "a.png"]
