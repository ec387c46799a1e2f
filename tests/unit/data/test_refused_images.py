"""Errors of files that cannot be read as images."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kl_vae.data import ImageError, read_image, read_size
from kl_vae.data.decoding import inspect_from, open_file
from kl_vae.data.pixel_format import PixelFormat
from kl_vae.runtime.files import display_name
from tests.bad_files import bmp, bombs, jpeg_of_scans, png, tiff, zeros
from tests.messages import is_about, mentions

GREY = np.array([[0, 40, 80], [120, 160, 200]], np.uint8)


def refusal(path: Path, channels: int = 3, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, channels, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def inspection_refusal(path: Path, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        inspect_from(partial(open_file, path), str(path), **options)
    return str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert refusal(path) == f"{path}: No such file or directory"
    with pytest.raises(ImageError, match="No such file"):
        read_size(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    assert "Permission denied" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "npy"])
def test_a_named_pipe_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    os.mkfifo(path)
    assert is_about(refusal(path), path, "regular file")
    with pytest.raises(ImageError, match=mentions(path, "regular file")):
        read_size(path)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert is_about(refusal(tmp_path / "a.png"), tmp_path / "a.png", "regular file")


@pytest.mark.parametrize("suffix", ["png", "npy"])
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").touch()
    path = tmp_path / f"a.{suffix}"
    assert is_about(refusal(path), path, "empty")


@pytest.mark.parametrize(
    "content", [b"garbage " * 20, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"P5 1 1 255 a"]
)
def test_other_file_formats(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    formats = "JPEG, PNG, WEBP, BMP, TIFF, GIF"
    assert is_about(refusal(tmp_path / "a.png"), tmp_path / "a.png", formats)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
@pytest.mark.parametrize("kept", [0.02, 0.1, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert refusal(path).startswith(f"{path}: ")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "npy"])
def test_flipped_bytes_raise_image_errors_only(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 12, 3), np.uint8)
    if suffix == "npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        damaged = content.copy()
        where = rng.integers(0, min(len(damaged), 200), 4)
        damaged[where] = rng.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes())
        for read in (lambda: read_image(path, 3, max_pixels=10_000), lambda: read_size(path)):
            try:
                read()
            except ImageError as error:
                assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tile.tif", ("tiles", "16384 x 16384", "max_pixels=178956970")),
        ("tile_of_no_size.tif", ("tile", "size")),
        ("scans.jpg", ("101 scans", 100)),
        ("strips.tif", ("strips", 300000, 262144)),
        ("frame.gif.png", ("Pillow", "max_pixels", "PNG")),
    ],
)
def test_bombs(tmp_path: Path, name: str, parts: tuple[object, ...]) -> None:
    (tmp_path / name).write_bytes(bombs()[name])
    assert is_about(refusal(tmp_path / name), tmp_path / name, *parts)


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(20_000, 30_000, zeros(30_000 * 20_001)))
    parts = (tmp_path / "a.png", "20000 x 30000", "max_pixels=178956970")
    assert is_about(refusal(tmp_path / "a.png"), *parts)
    assert read_size(tmp_path / "a.png") == (30_000, 20_000)


def test_scans_of_a_jpeg_are_counted_outside_of_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for scans, thumbnail in ((100, b""), (100, jpeg_of_scans(150)), (6, b"\xff\xda" * 200)):
        path.write_bytes(jpeg_of_scans(scans, b"Exif\0\0" + thumbnail if thumbnail else b""))
        assert read_image(path, 1).unique().tolist() == [99]
    path.write_bytes(jpeg_of_scans(2_000, b"Exif\0\0" + jpeg_of_scans(6)))
    assert is_about(refusal(path, 1), path, "2000 scans", 100)
    assert read_size(path) == (30, 40)


def test_images_of_2_to_the_31_pixels(tmp_path: Path) -> None:
    for name, content in (
        ("a.png", png(2**16, 2**15, zeros(100))),
        ("a.bmp", bmp(2**16, 2**15, b"")),
        ("a.tif", tiff({256: 2**16, 257: 2**15, 273: [200], 278: 1})),
    ):
        (tmp_path / name).write_bytes(content)
        assert is_about(refusal(tmp_path / name), "65536 x 32768", "max_pixels=178956970")


def test_an_image_without_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0, 4, zeros(4)))
    assert refusal(tmp_path / "a.png").startswith(f"{tmp_path}/a.png: ")


def test_max_pixels_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", GREY)
    for name in ("a.png", "a.npy"):
        assert is_about(refusal(tmp_path / name, 1, max_pixels=5), "max_pixels=5")
        assert read_image(tmp_path / name, 1, max_pixels=6).shape == (1, 2, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)  # Pillow would refuse at 4
    assert read_image(tmp_path / "a.png", 1).shape == (1, 2, 3)
    assert Image.MAX_IMAGE_PIXELS == 2


@pytest.mark.parametrize("channels", [2, 5])
def test_other_channel_counts_are_an_error(tmp_path: Path, channels: int) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    parts = ("1 bands", f"{channels} channels", f"[height, width, {channels}]", ".npy")
    assert is_about(refusal(tmp_path / "a.png", channels), tmp_path / "a.png", *parts)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(path, "wb") as stream:
        Image.fromarray(GREY).save(stream, "PNG")
    np.testing.assert_array_equal(read_image(Path(os.fsdecode(path)), 1)[0], GREY)
    text = refusal(Path(os.fsdecode(path)), 2)
    assert text.startswith(f"{tmp_path}/caf\\xe9.png: ")
    text.encode("utf-8")


def test_display_name() -> None:
    assert display_name("a b/é.png") == "a b/é.png"
    assert display_name("a\nb.png") == "a\\nb.png"
    assert display_name(os.fsdecode(b"\xff.png")) == "\\xff.png"


@pytest.mark.parametrize(
    ("tags", "value"),
    [({277: 2**31 - 1}, 2**31 - 1), ({277: 0}, 0), ({258: [8, 8, 2**31]}, 2**31)],
)
def test_impossible_bands_and_bits_of_a_tiff(
    tmp_path: Path, tags: dict[int, object], value: int
) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff({273: [200], 278: 8, **tags}))
    for read in (refusal, inspection_refusal):
        assert is_about(read(path), path, value)


def test_bands_that_take_much_memory_are_refused_before_decoding(tmp_path: Path) -> None:
    pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    # 256 x 256 pixels of 60000 bands of 16 bits
    tags = {256: 256, 257: 256, 258: 16, 262: 1, 277: 60_000, 273: [200], 278: 256}
    path.write_bytes(tiff(tags))
    for read in (refusal, inspection_refusal):
        assert is_about(read(path, max_pixels=10**6), path, 256 * 256 * 60_000 * 2, "max_pixels")


def test_max_pixels_holds_for_every_page(tmp_path: Path) -> None:
    first, *others = (Image.new("L", (side, 9)) for side in (9, 9, 50))
    first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    pages = PixelFormat(pages="channels")
    with pytest.raises(ImageError, match=mentions(tmp_path / "a.tif", "50 x 9", "max_pixels=100")):
        read_image(tmp_path / "a.tif", 3, max_pixels=100, pixel_format=pages)


def test_a_reason_is_short(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\1\0\x10\x27" + b"\xff" * 10_000)  # the reason cites the header
    text = refusal(path)
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < 600 + len(str(path))
