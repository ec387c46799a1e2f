"""Compare the conversion of each Pillow mode with values computed by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kl_vae.data import ImageError, pil_to_tensor, read_image
from tests.messages import mentions


def pixel(image: Image.Image, channels: int) -> list[int]:
    """The first pixel, after conversion."""
    tensor = pil_to_tensor(image, channels)
    assert tensor.shape == (channels, image.height, image.width)
    return tensor[:, 0, 0].tolist()


# mode, stored value -> grey, RGB, RGBA.
# Over white: 100 at alpha 51 (1/5) is 100/5 + 255*4/5 = 224. Grey of RGB: .299 R + .587 G + .114 B.
@pytest.mark.parametrize(
    ("mode", "value", "grey", "rgb", "rgba"),
    [
        ("1", 1, [255], [255] * 3, [255] * 4),
        ("1", 0, [0], [0] * 3, [0, 0, 0, 255]),
        ("L", 77, [77], [77] * 3, [77, 77, 77, 255]),
        ("LA", (100, 51), [224], [224] * 3, [100, 100, 100, 51]),
        ("PA", (0, 51), [224], [224] * 3, [100, 100, 100, 51]),
        ("RGB", (200, 100, 50), [124], [200, 100, 50], [200, 100, 50, 255]),
        ("RGBA", (100, 200, 255, 51), [239], [224, 244, 255], [100, 200, 255, 51]),
        ("RGBA", (9, 9, 9, 0), [255], [255] * 3, [9, 9, 9, 0]),
        ("RGBX", (200, 100, 50, 7), [124], [200, 100, 50], [200, 100, 50, 255]),
        ("CMYK", (0, 0, 0, 0), [255], [255] * 3, [255] * 4),
        ("CMYK", (255, 0, 0, 0), [179], [0, 255, 255], [0, 255, 255, 255]),
        ("CMYK", (0, 0, 0, 155), [100], [100] * 3, [100, 100, 100, 255]),
        ("YCbCr", (90, 128, 128), [90], [90] * 3, [90, 90, 90, 255]),
        ("HSV", (0, 255, 255), [76], [255, 0, 0], [255, 0, 0, 255]),
        ("I;16", 257 * 77, [77], [77] * 3, [77, 77, 77, 255]),
        ("I", 257 * 77, [77], [77] * 3, [77, 77, 77, 255]),
        ("F", 0.6, [153], [153] * 3, [153, 153, 153, 255]),
        ("F", 0.2, [51], [51] * 3, [51, 51, 51, 255]),
    ],
)
def test_modes(mode: str, value: object, grey: list[int], rgb: list[int], rgba: list[int]) -> None:
    if mode == "PA":
        image = Image.new("PA", (3, 2), value)
        image.putpalette([100, 100, 100])
    else:
        image = Image.new(mode, (3, 2), value)
    assert image.mode == mode
    assert pixel(image, 1) == grey
    assert pixel(image, 3) == rgb
    assert pixel(image, 4) == rgba


# L* in 255ths of 100; a* and b* are signed. L* = 50 is sRGB 119; (53, 80, 67) is nearly red
@pytest.mark.parametrize(
    ("lab", "rgb"),
    [((255, 0, 0), [255] * 3), ((128, 0, 0), [119] * 3), ((136, 80, 67), [255, 0, 0])],
)
def test_lab(lab: tuple[int, int, int], rgb: list[int]) -> None:
    image = Image.frombytes("LAB", (3, 2), bytes(lab) * 6)
    np.testing.assert_allclose(pixel(image, 3), rgb, atol=12)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bits_are_scaled_by_value(mode: str) -> None:
    values = [0, 128, 129, 257, 385, 386, 32768, 65278, 65406, 65407, 65535]
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (len(values), 1), np.array(values, order).tobytes())
    expected = [round(value / 257) for value in values]  # 257 is odd: there are no halves
    assert pil_to_tensor(image, 1).flatten().tolist() == expected
    assert expected == [0, 0, 1, 1, 1, 2, 128, 254, 254, 255, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_files(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}", 1).flatten().tolist() == [0, 128, 255]


def test_transparent_value_of_a_16_bit_png(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[100, 101]], np.uint16))
    image.save(tmp_path / "a.png", transparency=100)
    assert read_image(tmp_path / "a.png", 1).flatten().tolist() == [255, 0]
    assert read_image(tmp_path / "a.png", 4)[3].flatten().tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_transparent_colour_of_a_png(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), 60 if mode == "L" else (60, 60, 60))
    image.save(tmp_path / "a.png", transparency=60 if mode == "L" else (60, 60, 60))
    assert read_image(tmp_path / "a.png", 3)[0].flatten().tolist() == [0, 255]


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 100, 100, 100, 200, 0, 0])
    for x in range(3):
        image.putpixel((x, 0), x)
    return image


def test_palette(tmp_path: Path) -> None:
    palette_image().save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 3)
    assert image[:, 0].T.tolist() == [[10, 20, 30], [100, 100, 100], [200, 0, 0]]


def test_palette_with_one_transparent_entry(tmp_path: Path) -> None:
    palette_image().save(tmp_path / "a.gif", transparency=1)
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 3)
    assert image[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255], [200, 0, 0]]


def test_palette_with_one_alpha_per_entry(tmp_path: Path) -> None:
    palette_image().save(tmp_path / "a.png", transparency=bytes((255, 51, 0)))
    image = read_image(tmp_path / "a.png", 3)
    assert image[:, 0].T.tolist() == [[10, 20, 30], [224, 224, 224], [255, 255, 255]]
    assert read_image(tmp_path / "a.png", 4)[3, 0].tolist() == [255, 51, 0]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 0, 0, 155)).save(tmp_path / "a.jpg", quality=100)
    assert abs(read_image(tmp_path / "a.jpg", 3).float().mean() - 100) <= 2


@pytest.mark.parametrize("mode", ["1", "LA", "CMYK", "LAB", "F"])
def test_modes_of_tiff_files(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (3, 2))
    image.save(tmp_path / "a.tif")
    for channels in (1, 3, 4):
        assert read_image(tmp_path / "a.tif", channels).shape == (channels, 2, 3)


@pytest.mark.parametrize(
    ("values", "dtype", "parts"),
    [
        ([0, 65536], np.int32, ("int32", 0, 65536, "data.range=[0, 65536]")),
        ([-1, 5], np.int32, ("int32", -1, 5, "--range -1 5")),
        ([-0.5, 1], np.float32, ("float", -0.5, 1, "[0, 1]", "data.range=[-0.5, 1]")),
        ([0, 256], np.float32, ("float", 0, 256, "[0, 1]", "data.range=[0, 256]")),
        ([0, np.nan], np.float32, ("float", "nan", "finite")),
    ],
)
def test_values_out_of_range_are_an_error(
    tmp_path: Path, values: list[float], dtype: type, parts: tuple[object, ...]
) -> None:
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=mentions(tmp_path / "a.tif", *parts)):
        read_image(tmp_path / "a.tif", 1)


# --- images of several tiles


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize("size", [(1100, 530), (1, 1100), (513, 512)])
def test_large_images_keep_every_pixel(mode: str, channels: int, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], channels), np.uint8)
    image = pil_to_tensor(Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels), channels)
    np.testing.assert_array_equal(image.permute(1, 2, 0), pixels)


def test_one_invalid_value_at_the_end() -> None:
    values = np.zeros((600, 600), np.float32)
    values[-1, 0] = np.nan
    with pytest.raises(ValueError, match=mentions("float", "nan")):
        pil_to_tensor(Image.fromarray(values), 1)
