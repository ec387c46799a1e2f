"""Images as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae import AutoEncoderKL
from kl_vae.data import read_image
from kl_vae.visual.image_files import (
    PictureFormat,
    as_picture,
    as_pictures,
    as_saved,
    image_suffix,
    save_image,
    save_thumbnail,
)


def smooth(channels: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(24), indexing="ij")
    return torch.stack([(rows * 5 + columns * (c + 1)) for c in range(channels)]).byte()


def test_pictures_of_images(model: AutoEncoderKL) -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 5)
    assert as_saved(image)[0, 0].tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(as_picture(as_saved(image), model.to_rgb), as_saved(image))
    assert as_saved(image.repeat(2, 1, 1))[0, 0].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert image_suffix(1) == image_suffix(3) == image_suffix(4) == ".png"
    assert image_suffix(5) == ".npy"


def test_many_channels_are_stretched_to_the_range_of_both(tiny_ddconfig: dict) -> None:
    tiny_ddconfig |= {"in_channels": 5, "out_ch": 5}
    model = AutoEncoderKL(tiny_ddconfig, embed_dim=3, colorize_nlabels=5)
    dark, bright = torch.zeros(5, 4, 6), torch.ones(5, 4, 6)
    first, second = as_pictures(dark, bright, model.to_rgb)
    assert first.shape == second.shape == (3, 4, 6)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("name", "quality"), [("png", None), ("webp", 100)])
def test_formats_that_lose_nothing(
    tmp_path: Path, channels: int, name: str, quality: int | None
) -> None:
    picture_format = PictureFormat(name, quality)
    path = tmp_path / f"a{picture_format.suffix(channels)}"
    image = smooth(channels)
    save_image(path, image, picture_format)
    assert torch.equal(read_image(path, channels), image)


@pytest.mark.parametrize(("name", "kind"), [("webp", "WEBP"), ("jpg", "JPEG")])
def test_lossy_formats(tmp_path: Path, name: str, kind: str) -> None:
    image = smooth(3)
    sizes = []
    for quality in (None, 20):
        picture_format = PictureFormat(name, quality)
        path = tmp_path / f"a{picture_format.suffix(3)}"
        save_image(path, image, picture_format)
        with Image.open(path) as picture:
            assert picture.format == kind
        difference = (read_image(path, 3).float() - image.float()).abs().mean()
        assert 0 < difference < 20
        sizes.append(path.stat().st_size)
    assert sizes[0] > sizes[1]
    assert PictureFormat("webp").quality == 95 and PictureFormat("jpg").quality == 90


def test_arrays_are_floats_in_the_unit_interval(tmp_path: Path) -> None:
    save_image(tmp_path / "b.npy", as_saved(torch.rand(5, 12, 13) * 3 - 1.5))
    saved = np.load(tmp_path / "b.npy")
    assert (saved.dtype, saved.shape) == (np.float32, (12, 13, 5))
    assert saved.min() == 0
    assert saved.max() == 1


def test_thumbnails_are_small_and_none_is_made_larger(tmp_path: Path) -> None:
    for size, small in [((300, 200), (128, 85)), ((20, 24), (20, 24)), ((5000, 1), (128, 1))]:
        save_thumbnail(tmp_path / "a.jpg", torch.zeros(3, size[1], size[0], dtype=torch.uint8))
        with Image.open(tmp_path / "a.jpg") as thumbnail:
            assert thumbnail.size == small


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gif",), "format='gif': give one of png, webp, jpg"),
        (("png", 90), "quality=90: png loses nothing; give webp or jpg, too"),
        (("jpg", 101), "quality=101: give a number from 1 to 100"),
        (("webp", 0), "quality=0: give a number from 1 to 100"),
    ],
)
def test_impossible_formats(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PictureFormat(*arguments)


def test_what_a_format_does_not_hold() -> None:
    with pytest.raises(ValueError, match="format=jpg: holds no transparency; give png or webp"):
        PictureFormat("jpg").suffix(4)
    message = "format=webp: holds 1, 3 or 4 channels, and the model has 6; leave the format out"
    with pytest.raises(ValueError, match=message):
        PictureFormat("webp").suffix(6)
    message = "20000 x 5: a webp has sides of up to 16383 pixels; give png"
    with pytest.raises(ValueError, match=message):
        PictureFormat("webp").check_size(5, 20000)
    PictureFormat("png").check_size(5, 2000000)
