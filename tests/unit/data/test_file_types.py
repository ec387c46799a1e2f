"""Types of image files: what is read, and what is said of the rest."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from kl_vae.data import ImageError, file_types, list_images, open_root, read_image, read_size
from kl_vae.data.file_types import IMAGE_EXTENSIONS
from tests.messages import is_about, mentions
from tests.shards import picture, write_shard

RED = torch.tensor([254.0, 0.0, 0.0]).view(3, 1, 1)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without plugins."""
    for kind in ("_AVIF", "_HEIC", "_JPEG_XL", "_JPEG_2000"):
        missing = getattr(file_types, kind)._replace(available=False)
        monkeypatch.setattr(file_types, kind, missing)
    optional = tuple(kind._replace(available=False) for kind in file_types._OPTIONAL)
    monkeypatch.setattr(file_types, "_OPTIONAL", optional)
    unread = {extension for kind in optional for extension in kind.extensions}
    kept = tuple(extension for extension in IMAGE_EXTENSIONS if extension not in unread)
    monkeypatch.setattr("kl_vae.data.folder.IMAGE_EXTENSIONS", kept)
    yield


@pytest.mark.parametrize(
    "extension",
    [".jfif", ".jpe", ".JFIF", ".gif", ".apng", ".mpo", ".jp2", ".j2k", ".avif", ".heic", ".jxl"],
)
def test_types_that_are_read(tmp_path: Path, extension: str) -> None:
    if extension not in IMAGE_EXTENSIONS and extension.islower():
        pytest.skip(f"no plugin for {extension} is installed")
    kind = {".apng": "PNG", ".mpo": "JPEG", ".JFIF": "JPEG"}.get(extension)
    Image.new("RGB", (40, 32), (254, 0, 0)).save(tmp_path / f"a{extension}", kind)
    assert list_images(tmp_path, 3) == [f"a{extension}"]
    source = open_root(str(tmp_path), 3)
    assert source.size(0) == (32, 40)
    assert (source.read(0).float() - RED).abs().max() <= 8
    (tmp_path / "b.jpg").write_bytes((tmp_path / f"a{extension}").read_bytes())  # by content
    assert torch.equal(read_image(tmp_path / "b.jpg", 3), source.read(0))
    shard = write_shard(tmp_path / "a.tar", {f"x{extension}": (tmp_path / "b.jpg").read_bytes()})
    assert torch.equal(open_root(str(shard), 3).read(0), source.read(0))


@pytest.mark.parametrize("extension", [".avif", ".heic", ".jxl"])
def test_orientation_is_applied_once(tmp_path: Path, extension: str) -> None:
    if extension not in IMAGE_EXTENSIONS:
        pytest.skip(f"no plugin for {extension} is installed")
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, 24:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    path = tmp_path / f"a{extension}"
    options = {"use_container": True} if extension == ".jxl" else {}
    Image.fromarray(pixels).save(path, exif=exif.tobytes(), quality=95, **options)
    image = read_image(path, 3).float()
    assert tuple(image.shape[1:]) == read_size(path)
    if extension != ".jxl":  # which has an orientation beside EXIF: none here
        image = image.mT
    assert image.shape == (3, 32, 48)
    assert image[:, :, :20].max() < 30 and image[:, :, 28:].min() > 220


def test_jpeg_xl_of_a_jpeg(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, 24:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "a.jxl", lossless_jpeg=True)
    assert torch.equal(read_image(tmp_path / "a.jxl", 3), read_image(tmp_path / "a.jpg", 3))


@pytest.mark.parametrize(
    "size", [(8, 8), (256, 256), (64, 96), (100, 37), (9, 16), (1, 1000), (700, 9001), (24, 40)]
)
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_jpeg_xl(tmp_path: Path, size: tuple[int, int], container: bool) -> None:
    pytest.importorskip("pillow_jxl")
    path = tmp_path / "a.jxl"
    Image.new("L", size[::-1]).save(path, effort=1, use_container=container)
    with path.open("rb") as stream:
        assert file_types._jpeg_xl_size(stream) == size


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        (b"\xff\x0a" + ((2**30 - 1) << 3 | 3 << 1 | 1 << 33).to_bytes(10, "little"), (2**30,)),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\0free", ("damaged",)),
        (b"\0\0\0\x0cJXL \r\n\x87\n", ("damaged",)),
    ],
)
def test_jpeg_xl_that_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: bytes, parts: tuple[object, ...]
) -> None:
    available = file_types._JPEG_XL._replace(available=True)
    monkeypatch.setattr(file_types, "_JPEG_XL", available)
    monkeypatch.setitem(Image.OPEN, "JXL", (lambda *_: pytest.fail("decoded"), None))
    path = tmp_path / "a.jxl"
    path.write_bytes(header)
    with pytest.raises(ImageError, match=mentions(path, "JPEG XL", *parts)):
        read_image(path, 3)


def test_files_that_are_not_read_are_reported_once(
    tmp_path: Path, plain: None, caplog: pytest.LogCaptureFixture
) -> None:
    members = dict.fromkeys(("1.heic", "2.HEIC", "3.avif", "4.ppm", "5.npy", "n.txt", "6.cls"), b"")
    members |= {"a.png": picture(0), "x/b.gif": picture(1), "x/c.heif": b""}
    for name, content in members.items():
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(content)
    shard = write_shard(tmp_path / "a.tar", members)
    for root in (tmp_path / "f", shard):
        caplog.clear()
        assert list(open_root(str(root), 3).keys) == ["a.png", "x/b.gif"]
        (warning,) = (x for x in caplog.records if x.levelno == logging.WARNING)
        parts = (root, "6 files", "2 .heic", "1 .heif", "1 .avif", "1 .ppm", "1 .npy")
        assert is_about(warning.getMessage(), *parts, "kl-vae[formats]", "*.npy", "PNG")
        assert ".txt" not in warning.getMessage()
        caplog.clear()
        open_root(str(root), 3, exclude=["*.heic", "*.HEIC", "[3-5].*", "x/*"])
        assert not [x for x in caplog.records if x.levelno == logging.WARNING]


def test_skipped_files_beside_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path / "a.tar", {"a.png": picture(0)})
    (tmp_path / "b.psd").write_bytes(b"")
    open_root(str(tmp_path), 3)
    assert is_about(caplog.text, tmp_path, "1 .psd")


def test_a_folder_without_images_says_how_to_read_what_is_there(
    tmp_path: Path, plain: None
) -> None:
    for name, parts in (
        ("a.heic", ("1 .heic", "kl-vae[formats]")),
        ("a.npy", ("1 .npy", "data.train.include", "--include '*.npy'")),
        ("a.tga", ("1 .tga", "PNG")),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=mentions(tmp_path, *parts)):
            open_root(str(tmp_path), 3)
        with pytest.raises(ValueError, match=mentions(*parts[1:])):
            open_root(str(write_shard(tmp_path / "s" / f"{name}.tar", {name: b""})), 3)
        (tmp_path / "s" / f"{name}.tar").unlink()
        (tmp_path / name).unlink()


def test_images_that_cannot_have_so_many_channels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match=mentions(tmp_path, "1 .png", ".npy", "channels", 1, 3, 4)):
        open_root(str(tmp_path), 5)


@pytest.mark.parametrize(
    ("content", "title"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400), "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(400), "HEIC"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1miaf" + bytes(400), "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif" + bytes(400), "AVIF"),
        (b"\xff\x0a" + bytes(100), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "JPEG 2000"),
        (b"\xff\x4f\xff\x51" + bytes(100), "JPEG 2000"),
    ],
)
def test_types_that_are_not_read_are_named(
    tmp_path: Path, plain: None, content: bytes, title: str
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (lambda: read_image(path, 3), lambda: read_size(path)):
        with pytest.raises(ImageError, match=mentions(path, title, "kl-vae[formats]", "PNG")):
            read()


def test_pillow_does_not_see_the_readers_of_this_package(tmp_path: Path) -> None:
    importlib.import_module("kl_vae.data.file_types")
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100))
    assert not {"JPEG XL", "AVIF or HEIC", "JPEG 2000"} & set(Image.ID)
    assert features.check("jpg_2000") == (".jp2" in IMAGE_EXTENSIONS)
