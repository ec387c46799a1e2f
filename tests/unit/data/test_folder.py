"""Listing a folder: what is found, in which order, and what is said where nothing is."""

import os
import socket
import sys
from pathlib import Path

import pytest
from PIL import Image

from kl_vae.data import ImageError, list_images, read_image, resolve_root, select


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


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "._a.png", ".cache/b.png", "__MACOSX/c.png", "x/.thumbs/d.png")
    assert list_images(tmp_path, 3) == ["a.png"]


def test_arrays_are_for_other_channel_counts_unless_they_are_asked_for(tmp_path: Path) -> None:
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


def test_what_is_no_folder_is_listed_for_its_reader_to_report(
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
        with pytest.raises(ImageError, match=f"{path}: not a regular file"):
            read_image(tmp_path / path, 3)


def test_links_that_lead_nowhere_are_reported_when_they_are_read(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match=r"no images in .*\\xff"):
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
    assert refusal(path, 3) == f"no such folder: {path}; give an existing folder of images"


def test_not_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "a.png")
    path = tmp_path / "a.png"
    assert refusal(path, 3) == f"not a folder: {path}; give an existing folder of images"


def test_an_empty_folder(tmp_path: Path) -> None:
    looked_for = ".jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff"
    expected = f"no images in {tmp_path}: looked for {looked_for}; it holds no files"
    assert refusal(tmp_path, 3) == expected


def test_a_folder_of_other_files(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.txt", "c.TXT", "d.json", "e.json", "README", "g.zip", "h.png")
    assert refusal(tmp_path, 7) == (
        f"no images in {tmp_path}: looked for .npy; it holds 8 other files "
        "(3 .txt, 2 .json, 1 no extension)"
    )


def test_patterns_that_leave_nothing(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "b.png")
    assert refusal(tmp_path, 3, ("*.jpg",), ("a*",)) == (
        "include=['*.jpg'] and exclude=['a*'] leave none of the 2 images in "
        f"{tmp_path}: change the patterns"
    )


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/b.png")
    scandir = os.scandir

    def refuse(path: str) -> object:  # root, who may run the tests, is never refused
        if os.path.join(path, "").endswith("/a/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(tmp_path, 3) == (
        f"cannot read the folder {tmp_path}/a/ (Permission denied): "
        "make it readable, or give another folder"
    )


# --- roots


def test_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert resolve_root("~/images") == Path("/home/somebody/images")
    assert resolve_root("images/train") == Path("images/train")
    assert resolve_root("~no-such-user/images") == Path("~no-such-user/images")


def test_root_inside_a_package_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "some_pictures/data/a.png")
    (tmp_path / "some_pictures" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_root("package:some_pictures/data") == tmp_path / "some_pictures" / "data"
    assert resolve_root("package:some_pictures") == tmp_path / "some_pictures"
    assert "some_pictures" not in sys.modules


@pytest.mark.parametrize(
    ("root", "text"),
    [
        (
            "package:no_such_pictures/data",
            "package:no_such_pictures/data: no Python package 'no_such_pictures' is installed: "
            "pip install no_such_pictures, or give a folder",
        ),
        ("package:", "package:: no Python package '' is installed"),
        ("package:a.b/data", "no Python package 'a.b' is installed"),
        ("package:colorsys/data", "no Python package 'colorsys' is installed"),
    ],
)
def test_roots_in_packages_that_are_not_there(root: str, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_root(root)
    assert text in str(caught.value)


def test_the_demonstration_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kl-vae\[demo\]', or give a folder"):
        resolve_root("package:skimage/data")
