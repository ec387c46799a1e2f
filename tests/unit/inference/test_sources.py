import pytest
from PIL import Image

from kl_vae.inference.sources import list_sources


@pytest.fixture
def folder(tmp_path):
    for name in ("images/b/x.png", "images/a.jpg", "more/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    return tmp_path


def test_folders_and_files_in_their_order_each_image_once(folder):
    roots = [str(folder / name) for name in ("more", "images", "images/a.jpg")]
    sources, folders = list_sources(roots, 3)
    assert [source.relative for source in sources] == ["a.jpg", "a.jpg", "b/x.png"]
    assert sources[1].path == folder / "images" / "a.jpg"
    assert folders == [folder / "more", folder / "images"]


def test_patterns_are_for_folders(folder):
    roots = [str(folder / "images"), str(folder / "more" / "a.jpg")]
    sources, _ = list_sources(roots, 3, include=["*.png"], exclude=["a.*"])
    assert [source.path for source in sources] == [
        folder / "images" / "b" / "x.png",
        folder / "more" / "a.jpg",
    ]


def test_a_folder_must_exist(folder):
    with pytest.raises(ValueError, match="no such folder: .*nothing; give an existing folder"):
        list_sources([str(folder / "images"), str(folder / "nothing")], 3)
