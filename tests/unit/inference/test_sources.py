"""Opening the images given to a command."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from kl_vae.inference.sources import open_sources
from tests.messages import mentions
from tests.shards import make_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images/b/x.png", "images/a.jpg", "more/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    return tmp_path


def test_folders_and_files_in_order_without_duplicates(folder: Path) -> None:
    roots = [str(folder / name) for name in ("more", "images", "images/a.jpg")]
    source, folders = open_sources(roots, 3)
    assert [source.key(i) for i in range(len(source))] == ["a.jpg", "a.jpg", "b/x.png"]
    assert source.name(1) == f"{folder}/images/a.jpg"
    assert source.read(2).shape == (3, 2, 2)
    assert folders == [folder / "more", folder / "images"]


def test_patterns_are_for_folders(folder: Path) -> None:
    roots = [str(folder / "images"), str(folder / "more" / "a.jpg")]
    source, _ = open_sources(roots, 3, include=["*.png"], exclude=["a.*"])
    assert source.files == [folder / "images" / "b" / "x.png", folder / "more" / "a.jpg"]


def test_a_folder_must_exist(folder: Path) -> None:
    with pytest.raises(ValueError, match=mentions(folder / "nothing")):
        open_sources([str(folder / "images"), str(folder / "nothing")], 3)


def test_folders_shards_and_files_together(folder):
    make_shards(folder / "shards", shards=2, images=2)
    shard = str(folder / "shards" / "train-0001.tar")
    roots = [str(folder / "more"), shard, str(folder / "shards"), str(folder / "shards/*.tar")]
    source, folders = open_sources(roots, 3)
    keys = ["a.jpg", "00002.png", "00003.png", "00000.png", "00001.png"]
    assert [source.key(i) for i in range(len(source))] == keys
    assert source.name(1) == f"{shard}/00002.png"
    assert [source.label_text(i) for i in range(5)] == [None, "2", "3", "0", "1"]
    assert source.size(4) == (16, 20) and source.read(4).shape == (3, 16, 20)
    assert folders == [folder / "more", folder / "shards"]
    assert set(source.files) >= {folder / "shards" / f"train-000{i}.tar" for i in (0, 1)}
    again, _ = open_sources([shard], 3, include=["*3.png"])
    assert [again.key(i) for i in range(len(again))] == ["00003.png"]
    with pytest.raises(ValueError, match=mentions("train-0007.tar", "No such file")):
        open_sources([str(folder / "shards" / "train-0007.tar")], 3)
