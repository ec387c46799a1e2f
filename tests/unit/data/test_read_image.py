"""Decode image files: formats, orientation and frames."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae.data import (
    read_image,
    read_size,
    to_float,
    to_uint8,
)

# [H=2, W=3]: all pixels differ, so that a wrong transpose is detected
GREY = np.array([[0, 40, 80], [120, 160, 200]], np.uint8)
ORIENTED = {
    1: GREY,
    2: GREY[:, ::-1],
    3: GREY[::-1, ::-1],
    4: GREY[::-1],
    5: GREY.T,
    6: np.rot90(GREY, -1),
    7: GREY[::-1, ::-1].T,
    8: np.rot90(GREY),
}


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "tiff", "PNG"])
def test_lossless_formats_are_exact(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path, 3)
    assert image.dtype == torch.uint8
    assert image.permute(1, 2, 0).is_contiguous()
    np.testing.assert_array_equal(image.permute(1, 2, 0), pixels)
    assert read_size(path) == (5, 7)


def test_jpeg_is_read_approximately(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 8), (200, 100, 50)).save(path, quality=95)
    image = read_image(path, 3)
    assert image.shape == (3, 8, 16)
    expected = torch.tensor([200.0, 100.0, 50.0])
    torch.testing.assert_close(image.float().mean((1, 2)), expected, atol=2, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(GREY).convert("RGB").save(path, exif=exif, **options)
    expected = ORIENTED[orientation]
    np.testing.assert_array_equal(read_image(path, 1)[0], expected)
    assert read_size(path) == expected.shape


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_jpeg(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = np.kron(GREY, np.ones((16, 16), np.uint8))  # blocks survive compression
    Image.fromarray(large).save(path, exif=exif, quality=100)
    expected = np.kron(ORIENTED[orientation], np.ones((16, 16), np.uint8))
    assert np.abs(read_image(path, 1)[0].numpy().astype(int) - expected).max() <= 2
    assert read_size(path) == expected.shape


def test_orientation_out_of_range_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 1)[0], GREY)
    assert read_size(tmp_path / "a.png") == (2, 3)


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("L", (8, 8), 128).save(path, exif=b"Exif\0\0XX\x2a\0broken")
    assert read_image(path, 1).shape == (1, 8, 8)
    assert read_size(path) == (8, 8)


def test_the_format_is_detected_by_content(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", 1)[0], GREY)


@pytest.mark.parametrize("suffix", ["webp", "png", "gif"])
def test_the_first_of_several_frames(tmp_path: Path, suffix: str) -> None:
    first, second = Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 200)
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **options)
    assert read_image(tmp_path / f"a.{suffix}", 1).unique().tolist() == [10]


def test_file_handles_are_closed(tmp_path: Path) -> None:
    for suffix in ("tif", "png", "gif"):
        Image.fromarray(GREY).save(tmp_path / f"a.{suffix}")
        before = len(os.listdir("/proc/self/fd"))
        read_image(tmp_path / f"a.{suffix}", 1)
        read_size(tmp_path / f"a.{suffix}")
        assert len(os.listdir("/proc/self/fd")) == before


def test_to_float_and_back_is_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert (floats[0], floats[255]) == (-1, 1)
    assert torch.equal(to_uint8(floats), values)


def test_to_float_of_floats() -> None:
    assert to_float(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == [-1, 0, 1]
    assert to_float(torch.tensor([0.5], dtype=torch.float64)).dtype == torch.float32


def test_to_uint8_clamps_and_rounds() -> None:
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.0, -1 + 1.4 / 127.5])).tolist() == [0, 255, 128, 1]
    assert to_uint8(torch.ones(2, dtype=torch.bfloat16)).tolist() == [255, 255]
