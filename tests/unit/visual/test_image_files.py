"""Load and save image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae import AutoEncoderKL
from kl_vae.data import read_image
from kl_vae.visual.image_files import (
    ImageFormat,
    as_saved,
    both_for_display,
    for_display,
    image_suffix,
    load_image,
    save_image,
    save_thumbnail,
    write_image,
)
from tests.messages import mentions


def smooth(channels: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(24), indexing="ij")
    return torch.stack([(rows * 5 + columns * (c + 1)) for c in range(channels)]).byte()


def test_conversion_to_saved_images(model: AutoEncoderKL) -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 5)
    assert as_saved(image)[0, 0].tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(for_display(as_saved(image), model.to_rgb), as_saved(image))
    assert as_saved(image.repeat(2, 1, 1))[0, 0].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert image_suffix(1) == image_suffix(3) == image_suffix(4) == ".png"
    assert image_suffix(5) == ".npy"


def test_many_channels_share_one_range(tiny_ddconfig: dict) -> None:
    tiny_ddconfig |= {"in_channels": 5, "out_ch": 5}
    model = AutoEncoderKL(tiny_ddconfig, embed_dim=3, colorize_nlabels=5)
    dark, bright = torch.zeros(5, 4, 6), torch.ones(5, 4, 6)
    first, second = both_for_display(dark, bright, model.to_rgb)
    assert first.shape == second.shape == (3, 4, 6)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("name", "quality"), [("png", None), ("webp", 100)])
def test_lossless_formats(tmp_path: Path, channels: int, name: str, quality: int | None) -> None:
    image_format = ImageFormat(name, quality)
    path = tmp_path / f"a{image_format.suffix(channels)}"
    image = smooth(channels)
    write_image(path, image, image_format)
    assert torch.equal(read_image(path, channels), image)


@pytest.mark.parametrize(("name", "kind"), [("webp", "WEBP"), ("jpg", "JPEG")])
def test_lossy_formats(tmp_path: Path, name: str, kind: str) -> None:
    image = smooth(3)
    sizes = []
    for quality in (None, 20):
        image_format = ImageFormat(name, quality)
        path = tmp_path / f"a{image_format.suffix(3)}"
        write_image(path, image, image_format)
        with Image.open(path) as picture:
            assert picture.format == kind
        difference = (read_image(path, 3).float() - image.float()).abs().mean()
        assert 0 < difference < 20
        sizes.append(path.stat().st_size)
    assert sizes[0] > sizes[1]
    assert ImageFormat("webp").quality == 95 and ImageFormat("jpg").quality == 90


def test_arrays_are_floats_in_the_unit_interval(tmp_path: Path) -> None:
    write_image(tmp_path / "b.npy", as_saved(torch.rand(5, 12, 13) * 3 - 1.5))
    saved = np.load(tmp_path / "b.npy")
    assert (saved.dtype, saved.shape) == (np.float32, (12, 13, 5))
    assert saved.min() == 0
    assert saved.max() == 1


def test_a_thumbnail_shows_images_side_by_side(tmp_path: Path) -> None:
    pair = [torch.full((3, 200, 400), value, dtype=torch.uint8) for value in (0, 200)]
    save_thumbnail(tmp_path / "a.jpg", *pair)
    with Image.open(tmp_path / "a.jpg") as thumbnail:
        assert thumbnail.size == (256, 64)
        values = [thumbnail.getpixel((x, 32))[0] for x in (60, 190)]  # type: ignore[index]
    assert values == pytest.approx([0, 200], abs=3)


def test_thumbnails_are_never_upsampled(tmp_path: Path) -> None:
    for size, small in [((300, 200), (128, 85)), ((20, 24), (20, 24)), ((5000, 1), (128, 1))]:
        save_thumbnail(tmp_path / "a.jpg", torch.zeros(3, size[1], size[0], dtype=torch.uint8))
        with Image.open(tmp_path / "a.jpg") as thumbnail:
            assert thumbnail.size == small


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("gif",), ("format='gif'", "png, webp, jpg")),
        (("png", 90), ("quality=90", "png", "webp", "jpg")),
        (("jpg", 101), ("quality=101", 1, 100)),
        (("webp", 0), ("quality=0", 1, 100)),
    ],
)
def test_invalid_formats(arguments: tuple, parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        ImageFormat(*arguments)


def test_limits_of_formats() -> None:
    with pytest.raises(ValueError, match=mentions("format=jpg", "transparency", "png", "webp")):
        ImageFormat("jpg").suffix(4)
    with pytest.raises(ValueError, match=mentions("format=webp", "channels", 1, 3, 4, 6)):
        ImageFormat("webp").suffix(6)
    with pytest.raises(ValueError, match=mentions("20000 x 5", "webp", 16383, "png")):
        ImageFormat("webp").check_size(5, 20000)
    ImageFormat("png").check_size(5, 2000000)


def test_load_image_from_files_and_arrays(tmp_path: Path) -> None:
    pixels = smooth(3)
    array = pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = pixels[None] / 127.5 - 1
    sources = [tmp_path / "a.png", f"{tmp_path}/a.png", Image.fromarray(array), array, pixels]
    for source in sources:
        image = load_image(source)
        assert image.dtype == torch.float32 and image.is_contiguous()
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    floats = load_image((array / 255.0).astype(np.float64))
    torch.testing.assert_close(floats, expected, rtol=0, atol=1e-6)
    grey = load_image(array[:, :, 0], channels=1)
    torch.testing.assert_close(grey, expected[:, :1], rtol=0, atol=1e-6)
    assert load_image(tmp_path / "a.png", channels=4).shape == (1, 4, 20, 24)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (1, 3, 6, 4)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert load_image(opened).shape == (1, 3, 6, 4)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (torch.zeros(3, 4, 4), ("torch.float32", "uint8")),
        (torch.zeros(4, 4, 4, dtype=torch.uint8), ("[4, 4, 4]", "[3, H, W]")),
        (np.zeros((4, 4), np.uint8), ("[4, 4]", "[H, W, 3]")),
        (np.zeros((4, 4, 3), np.uint16), ("uint16", "uint8")),
        (np.full((4, 4, 3), -1.0), (-1, "[0, 1]")),
        (np.full((4, 4, 3), np.nan), ("nan", "[0, 1]")),
    ],
)
def test_invalid_images_are_an_error(source: object, parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        load_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "jpeg", "npy"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    image = smooth(3)[None] / 127.5 - 1
    path = tmp_path / "new" / f"a.{suffix}"
    save_image(image * 1.0, path, quality=100 if suffix == "webp" else None)
    atol = 0.2 if suffix.startswith("jp") else 1e-6
    torch.testing.assert_close(load_image(path), image, rtol=0, atol=atol)
    save_image(image[0] * 9, path)
    assert load_image(path).abs().max() <= 1


def test_save_image_of_unsupported_images_is_an_error(tmp_path: Path) -> None:
    cases: list[tuple[torch.Tensor, str, tuple[object, ...]]] = [
        (torch.zeros(3, 4, 4), "a.gif", (tmp_path / "a.gif", ".png", ".npy")),
        (torch.zeros(5, 4, 4), "a.png", (tmp_path / "a.png", 5, ".npy")),
        (torch.zeros(2, 3, 4, 4), "a.png", ("[2, 3, 4, 4]", "[C, H, W]", "[-1, 1]")),
        (torch.zeros(3, 4, 4).byte(), "a.png", ("torch.uint8", "[C, H, W]", "[-1, 1]")),
        (torch.zeros(4, 4, 4), "a.jpg", ("format=jpg", "transparency")),
    ]
    for image, name, parts in cases:
        with pytest.raises(ValueError, match=mentions(*parts)):
            save_image(image, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
