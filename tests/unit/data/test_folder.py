"""List the images of a folder: selection, order and errors."""

import os
import socket
import sys
from pathlib import Path

import pytest
from PIL import Image

from kl_vae.data import ImageError, list_images, read_image, resolve_root, select
from tests.messages import is_about, mentions


def make(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"content")


def test_nested_and_sorted_by_bytes(tmp_path: Path) -> None:
    make(tmp_path, "b/z.JPG", "b.png", "a/x/1.webp", "a/10.png", "a/2.png", "é.bmp", "Z.tiff")
    make(tmp_path, "a.png", "notes.txt", "a/data.npy")
    assert list_images(tmp_path, 3) == [
        "Z.tiff",
        "a.png",
        "a/10.png",
        "a/2.png",
        "a/x/1.webp",
        "b.png",
        "b/z.JPG",
        "é.bmp",
    ]


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "._a.png", ".cache/b.png", "__MACOSX/c.png", "x/.thumbs/d.png")
    assert list_images(tmp_path, 3) == ["a.png"]


def test_arrays_are_listed_for_other_channel_counts_or_on_request(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "b.npy")
    assert list_images(tmp_path, 5) == ["b.npy"]
    for channels in (1, 3, 4):
        assert list_images(tmp_path, channels) == ["a.png"]
        assert list_images(tmp_path, channels, include=["*.npy"]) == ["b.npy"]
        assert list_images(tmp_path, channels, include=["*.npy", "*.png"]) == ["a.png", "b.npy"]


def test_links_are_followed_and_never_loop(tmp_path: Path) -> None:
    make(tmp_path, "root/m/a.png", "elsewhere/b.png", "elsewhere/deep/c.png")
    root = tmp_path / "root"
    (root / "a_link").symlink_to(root / "m")  # sorts before m, which keeps its name
    (root / "m" / "up").symlink_to(root)
    (root / "other").symlink_to(tmp_path / "elsewhere")
    (root / "self").symlink_to(root / "self")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "gone.png").symlink_to(root / "nothing.png")
    (root / "file.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    listed = ["file.png", "gone.png", "m/a.png", "other/b.png", "other/deep/c.png", "self.png"]
    assert list_images(root, 3) == listed


def test_special_files_are_listed_and_an_error_on_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has few characters
    make(tmp_path, "folder.png/a.png", ".hidden.png")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        paths = list_images(tmp_path, 3)
    assert paths == ["folder.png/a.png", "pipe.png", "socket.png"]
    for path in paths[1:]:
        with pytest.raises(ImageError, match=mentions(tmp_path / path, "regular file")):
            read_image(tmp_path / path, 3)


def test_broken_links_are_an_error_on_read(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert list_images(tmp_path, 3) == ["gone.png", "loop.png"]
    with pytest.raises(ImageError, match="gone.png: No such file or directory"):
        read_image(tmp_path / "gone.png", 3)
    with pytest.raises(ImageError, match="loop.png: Too many levels of symbolic links"):
        read_image(tmp_path / "loop.png", 3)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 7).save(tmp_path / "z.png")
    os.rename(tmp_path / "z.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    make(tmp_path, os.fsdecode(b"\xff/b.png"))
    paths = list_images(tmp_path, 1)
    assert [os.fsencode(path) for path in paths] == [b"caf\xe9.png", b"\xff/b.png"]
    assert read_image(tmp_path / paths[0], 1).unique().tolist() == [7]
    with pytest.raises(ValueError, match=mentions(r"\xff")):
        os.remove(os.fsencode(tmp_path) + b"/\xff/b.png")
        list_images(tmp_path / os.fsdecode(b"\xff"), 1)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), ["a/1.png", "a/2.jpg", "b/1.png", "b/c/3.png"]),
        (("a/*",), (), ["a/1.png", "a/2.jpg"]),
        (("b/*",), (), ["b/1.png", "b/c/3.png"]),
        (("1.png",), (), ["a/1.png", "b/1.png"]),
        (("*.jpg", "b/c/*"), (), ["a/2.jpg", "b/c/3.png"]),
        ((), ("*.png",), ["a/2.jpg"]),
        (("a/*",), ("1.*",), ["a/2.jpg"]),
        ((), ("*/c/*",), ["a/1.png", "a/2.jpg", "b/1.png"]),
        (("[12].png",), (), ["a/1.png", "b/1.png"]),
    ],
)
def test_patterns(
    tmp_path: Path, include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]
) -> None:
    make(tmp_path, "a/1.png", "a/2.jpg", "b/1.png", "b/c/3.png")
    assert list_images(tmp_path, 3, include, exclude) == expected
    assert select(list_images(tmp_path, 3), include, exclude) == expected


def refusal(root: Path, *arguments: object) -> str:
    with pytest.raises(ValueError) as caught:
        list_images(root, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    assert is_about(refusal(path, 3), path, "folder")


def test_not_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "a.png")
    path = tmp_path / "a.png"
    assert is_about(refusal(path, 3), path, "folder")


def test_an_empty_folder(tmp_path: Path) -> None:
    looked_for = ".jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff"
    assert is_about(refusal(tmp_path, 3), tmp_path, looked_for)


def test_a_folder_of_other_files(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.txt", "c.TXT", "d.json", "e.json", "README", "g.zip", "h.png")
    assert is_about(refusal(tmp_path, 7), tmp_path, ".npy", 8, "3 .txt, 2 .json")


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "b.png")
    error = refusal(tmp_path, 3, ("*.jpg",), ("a*",))
    assert is_about(error, "include=['*.jpg']", "exclude=['a*']", 2, tmp_path)


def test_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/b.png")
    scandir = os.scandir

    def refuse(path: str) -> object:  # root, who may run the tests, is never refused
        if os.path.join(path, "").endswith("/a/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert is_about(refusal(tmp_path, 3), f"{tmp_path}/a", "Permission denied")


# --- roots


def test_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert resolve_root("~/images") == Path("/home/user/images")
    assert resolve_root("images/train") == Path("images/train")
    assert resolve_root("~no-such-user/images") == Path("~no-such-user/images")


def test_root_inside_a_package_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "some_images/data/a.png")
    (tmp_path / "some_images" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_root("package:some_images/data") == tmp_path / "some_images" / "data"
    assert resolve_root("package:some_images") == tmp_path / "some_images"
    assert "some_images" not in sys.modules


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("package:no_such_images/data", "no_such_images"),
        ("package:", ""),
        ("package:a.b/data", "a.b"),
        ("package:colorsys/data", "colorsys"),
    ],
)
def test_roots_in_missing_packages(root: str, name: str) -> None:
    install = f"pip install {name}"
    with pytest.raises(ValueError, match=mentions(root, f"'{name}'", install)):
        resolve_root(root)


def test_a_missing_demo_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=mentions("pip install 'kl-vae[demo]'")):
        resolve_root("package:skimage/data")
