"""What the numbers in image files mean: range, depth, polarity, bands, pages and profiles."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae import load_image
from kl_vae.data import (
    DataConfig,
    FolderSource,
    ImageError,
    PixelFormat,
    SourceConfig,
    ValidationConfig,
    build_datasets,
    decide_format,
    pil_to_tensor,
    read_image,
    read_size,
    to_float,
)
from kl_vae.data.pixel_format import (
    Inspected,
    Measured,
    check_pages,
    decide_ranges,
    parse_ranges,
)
from kl_vae.inference.images import load_images
from kl_vae.inference.sources import open_sources
from tests.image_kinds import (
    END,
    FULL12,
    PAGE,
    SIZE,
    START,
    Kind,
    columns,
    gamma_profile,
    kinds,
    png,
    table,
    tiff,
)
from tests.messages import is_about, mentions

pytest.importorskip("tifffile")
STEP = SIZE // 3


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_each_kind_is_read_the_same_everywhere(kind: Kind, tmp_path: Path) -> None:
    """The row of `docs/images.md`: its values, and the same tensor for every command."""
    for name in "ab":
        kind.write(tmp_path / f"{name}{kind.suffix}")
    settings = dict(kind.settings)
    include = (f"*{kind.suffix}",)
    config = DataConfig(
        train=SourceConfig(str(tmp_path), include),
        validation=ValidationConfig(include=(f"b{kind.suffix}",)),
        flip=False,
        num_workers=0,
        **settings,
    )
    training, validation = build_datasets(config, kind.channels, SIZE, seed=0)
    assert validation is not None
    source, _ = open_sources(
        [str(tmp_path)],
        kind.channels,
        include,
        value_range=settings.get("range", "auto"),
        pages=settings.get("pages"),
    )
    read = [sample.image for sample in (training[0, 0, 0], validation[0, 0, 0])]
    read = [to_float(x) if x.dtype == torch.uint8 else x for x in read]
    read += [loaded.image for loaded in load_images(source, [0, 1]) if loaded.image is not None]
    assert len(read) == 4
    for image in read:
        assert image.shape == (kind.channels, SIZE, SIZE)
        assert torch.equal(image, read[0])
    middle = read[0][0, SIZE // 2, STEP // 2 :: STEP]
    tolerance = 2 if kind.suffix == ".jpg" else 0.5
    np.testing.assert_allclose((middle + 1) * 127.5, kind.read, atol=tolerance)
    for band in range(1, kind.channels if " bands" in kind.name or "infrared" in kind.name else 1):
        expected = read[0][0].roll(band * STEP, dims=1)
        assert torch.equal(read[0][band], expected), band


def test_the_table_of_the_page_is_that_of_the_tests() -> None:
    """`python -m tests.image_kinds` writes it."""
    text = PAGE.read_text()
    assert text.partition(START)[2].partition(END)[0] == table()


# --- the decision for a data set


def source_of(folder: Path, channels: int = 1) -> FolderSource:
    return FolderSource(folder, sorted(path.name for path in folder.iterdir()), channels)


def three(path: Path, given: list[float]) -> list[int]:
    """Return the values of the three columns, read with a given range."""
    pixel_format = PixelFormat(parse_ranges(given))
    return read_image(path, 1, pixel_format=pixel_format)[0, 0, ::STEP].tolist()


def test_a_dark_image_is_read_with_the_depth_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, stored in (("a", FULL12), ("dark", (0, 100, 200))):
        png(tmp_path / f"{name}.png", columns(stored, np.uint16))
    with caplog.at_level(logging.INFO):
        decided = decide_format(source_of(tmp_path), "auto", None)
    assert decided.value_range == {"uint16": [0, 4095]}
    assert is_about(caplog.text, "uint16", 0, 4095, 2)
    dark = read_image(tmp_path / "dark.png", 1, pixel_format=decided)
    assert dark[0, 0, ::STEP].tolist() == [0, 6, 12]


class Deep:
    """A source of 16-bit images whose values fit into 12 bits, except for the last eighth."""

    channels = 1

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def inspect(self, index: int) -> Inspected:
        high = 65535 if index >= self._number * 7 // 8 else 4095
        return Inspected(Measured("uint16", 0, high))

    def name(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize("number", [8, 100, 512, 5000])
def test_the_sample_is_spread_over_the_whole_data_set(number: int) -> None:
    assert decide_format(Deep(number), "auto", None).value_range == {"uint16": [0, 65535]}


def test_values_beyond_a_detected_range_are_an_error_of_the_file(tmp_path: Path) -> None:
    png(tmp_path / "a.png", columns((0, 5, 5000), np.uint16))
    decided = PixelFormat({"uint16": (0, 4095)})
    with pytest.raises(ImageError, match=mentions("a.png", 5000, "[0, 4095]", "data.range")):
        read_image(tmp_path / "a.png", 1, pixel_format=decided)
    given = PixelFormat(parse_ranges([0, 4095]))
    assert read_image(tmp_path / "a.png", 1, pixel_format=given)[0, 0, ::STEP].tolist() == [
        0,
        0,
        255,
    ]


def test_a_given_range_of_more_than_8_bits_does_not_apply_to_8_bits(tmp_path: Path) -> None:
    Image.fromarray(columns((0, 51, 255), np.uint8)).save(tmp_path / "a.png")
    given = PixelFormat(parse_ranges([0, 4095]))
    assert read_image(tmp_path / "a.png", 1, pixel_format=given)[0, 0, ::STEP].tolist() == [
        0,
        51,
        255,
    ]
    given = PixelFormat(parse_ranges([51, 102]))
    assert read_image(tmp_path / "a.png", 1, pixel_format=given)[0, 0, ::STEP].tolist() == [
        0,
        0,
        255,
    ]


@pytest.mark.parametrize(
    ("measured", "ranges"),
    [
        ([("uint16", 0, 4095)], {"uint16": (0, 4095)}),
        ([("uint16", 0, 4096)], {"uint16": (0, 16383)}),
        ([("uint16", 0, 200), ("uint16", 5, 1000)], {"uint16": (0, 1023)}),
        ([("uint16", 0, 255)], {"uint16": (0, 255)}),
        ([("uint16", 0, 0)], {"uint16": (0, 65535)}),
        ([("uint32", 0, 70)], {"uint32": (0, 255)}),
        ([("float", 0.1, 1.0000001)], {"float": (0, 1)}),
        ([("float", 0, 0.5), ("float", -1, 0.5)], {"float": (-1, 1)}),
    ],
)
def test_decided_ranges(
    measured: list[tuple[str, float, float]], ranges: dict[str, tuple[float, float]]
) -> None:
    assert decide_ranges(Measured(*values) for values in measured) == ranges


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("float", 0, 250), ("int16", -5, 9), ("uint32", 0, 3e9)]
)
def test_ranges_that_cannot_be_decided_show_the_values(kind: str, low: float, high: float) -> None:
    with pytest.raises(ValueError, match=mentions(kind, "data.range=", f"--range {low} ")):
        decide_ranges([Measured(kind, low, high)])


@pytest.mark.parametrize(
    "value", [[0], [5, 5], ["a", 1], {"uint12": [0, 1]}, "automatic", [0, True]]
)
def test_invalid_ranges(value: object) -> None:
    with pytest.raises(ValueError, match=mentions("range=", "auto")):
        parse_ranges(value)  # type: ignore[arg-type]


def test_floats_outside_by_rounding_are_clamped(tmp_path: Path) -> None:
    values = columns((0, 0.5, 1), np.float32)
    values[0] = np.nextafter(np.float32(1), np.float32(2))
    values[1] = -1e-7
    np.save(tmp_path / "a.npy", values)
    image = read_image(tmp_path / "a.npy", 1)
    assert (image.min(), image.max()) == (0, 1)


def test_load_image_takes_a_range(tmp_path: Path) -> None:
    png(tmp_path / "a.png", columns(FULL12, np.uint16))
    for source in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        image = load_image(source, channels=1, value_range=(0, 4095))
        np.testing.assert_allclose(image[0, 0, 0, ::STEP], [-1, -0.6, 1], atol=1e-6)


# --- bands, pages, profiles


def test_bands_are_never_dropped(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", columns((0, 9, 99), np.uint8, 4), photometric="rgb", extrasamples=[0])
    with pytest.raises(ImageError, match=mentions("a.tif", "4 bands", "in_channels=4")):
        read_image(tmp_path / "a.tif", 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("premultiplied", [False, True])
def test_alpha_of_a_tiff(tmp_path: Path, dtype: type, premultiplied: bool) -> None:
    white = np.iinfo(dtype).max
    rgba = np.full((4, 4, 4), white // 5, dtype)
    rgba[..., 3] = white // 5 * 2
    extra = "assocalpha" if premultiplied else "unassalpha"
    tiff(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=[extra])
    color = 127 if premultiplied else 51  # 51 of 102 is half of white
    image = read_image(tmp_path / "a.tif", 4)
    np.testing.assert_allclose(image[:, 0, 0], [color] * 3 + [102], atol=1)
    on_white = round(color * 0.4 + 255 * 0.6)
    np.testing.assert_allclose(read_image(tmp_path / "a.tif", 3)[:, 0, 0], on_white, atol=1)


def test_several_pages_need_a_decision(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", columns((0, 51, 255), np.uint8, 3).transpose(2, 0, 1), photometric=1)
    message = mentions("a.tif", "3 pages", "data.pages", "first", "channels", "images", "--pages")
    with pytest.raises(ImageError, match=message):
        read_image(tmp_path / "a.tif", 1)
    with pytest.raises(ValueError, match=message):
        decide_format(source_of(tmp_path), "auto", None)


def test_pages_as_images(tmp_path: Path) -> None:
    pages = columns((0, 51, 255), np.uint8, 3).transpose(2, 0, 1)
    tiff(tmp_path / "a.tif", pages, photometric=1)
    Image.fromarray(pages[0]).save(tmp_path / "b.png")
    source, _ = open_sources([str(tmp_path)], 1, pages="images")
    assert [source.key(i) for i in range(4)] == ["a.tif", "a.page2.tif", "a.page3.tif", "b.png"]
    for i in range(4):
        np.testing.assert_array_equal(source.read(i)[0], pages[i % 3])


def test_a_smaller_copy_is_no_page(tmp_path: Path) -> None:
    import tifffile

    image = columns((0, 51, 255), np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(image, photometric="minisblack")
        file.write(image[::2, ::2], photometric="minisblack", subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 1)[0], image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_orientation_of_a_tiff(tmp_path: Path, orientation: int, dtype: type) -> None:
    values = np.arange(24).reshape(4, 6)[..., None].repeat(3, axis=2)
    tag = (274, "H", 1, orientation, True)
    scale = 1 if dtype == np.uint8 else 257
    tiff(tmp_path / "a.tif", (values * scale).astype(dtype), photometric="rgb", extratags=[tag])
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.tif", 3)
    assert torch.equal(image, read_image(tmp_path / "a.png", 3))
    assert read_size(tmp_path / "a.tif") == tuple(image.shape[1:])


def test_transparent_color_of_a_16_bit_png(tmp_path: Path) -> None:
    from tests.image_kinds import png_chunk

    values = columns((0, 257, 65535), np.uint16, 3)
    color = b"".join(int(value).to_bytes(2, "big") for value in values[0, 0])
    png(tmp_path / "a.png", values, png_chunk(b"tRNS", color))
    alpha = read_image(tmp_path / "a.png", 4)[3]
    assert alpha[0, ::STEP].tolist() == [0, 255, 255]


def test_a_profile_is_applied_to_the_colors_of_a_transparent_image() -> None:
    image = Image.new("RGBA", (2, 2), (51, 51, 51, 128))
    image.info["icc_profile"] = gamma_profile(1.0)
    assert pil_to_tensor(image, 4)[:, 0, 0].tolist() == [124, 124, 124, 128]
    grey = Image.new("LA", (2, 2), (51, 128))
    grey.info["icc_profile"] = gamma_profile(1.0)
    assert pil_to_tensor(grey, 4)[:, 0, 0].tolist() == [124, 124, 124, 128]


def test_a_profile_that_cannot_be_used_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (4, 4), (51, 51, 51)).save(tmp_path / "a.png", icc_profile=b"damaged")
    assert read_image(tmp_path / "a.png", 3).unique().tolist() == [51]
    assert is_about(caplog.text, tmp_path / "a.png", "profile", "sRGB")


def test_an_animation_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "b.png", save_all=True, append_images=frames[1:])
    decide_format(source_of(tmp_path), "auto", None)
    assert is_about(caplog.text, "2 of 2", "first frame")


@pytest.mark.parametrize("text", ["a" * 10_000, "two\nlines", "\x1b[31m"])
def test_values_in_messages_are_short_and_printable(text: str) -> None:
    for check, key in ((parse_ranges, "range="), (check_pages, "pages=")):
        with pytest.raises(ValueError, match=mentions(key)) as caught:
            check(text)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 300
