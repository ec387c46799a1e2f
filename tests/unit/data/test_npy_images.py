"""Images from `.npy` files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kl_vae.data import ImageError, read_image, read_size
from tests.messages import is_about

GREY = np.array([[0, 40, 80], [120, 160, 200]], np.uint8)


def refusal(path: Path, channels: int = 3, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, channels, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_uint8_array_stays(tmp_path: Path) -> None:
    array = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    np.save(tmp_path / "a.npy", array)
    image = read_image(tmp_path / "a.npy", 5)
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image, array.transpose(2, 0, 1))
    assert read_size(tmp_path / "a.npy") == (2, 3)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_one_channel_arrays_with_or_without_the_axis(
    tmp_path: Path, shape: tuple[int, ...], order: str
) -> None:
    np.save(tmp_path / "a.npy", np.asarray(GREY.reshape(shape), order=order))
    np.testing.assert_array_equal(read_image(tmp_path / "a.npy", 1)[0], GREY)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_uint16_array_is_scaled(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.array([[0, 65535, 13107]], dtype))
    image = read_image(tmp_path / "a.npy", 1)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, torch.tensor([[[0.0, 1.0, 0.2]]]))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_float_array_becomes_float32(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.array([[0, 0.25, 1]], dtype))
    image = read_image(tmp_path / "a.npy", 1)
    assert image.dtype == torch.float32
    assert image.tolist() == [[[0, 0.25, 1]]]


@pytest.mark.parametrize(
    ("array", "channels", "parts"),
    [
        (np.array([[-0.5, 1]]), 1, ("-0.5", 1, "[0, 1]")),
        (np.array([[0, 255.0]]), 1, (0, 255, "[0, 1]")),
        (np.array([[0, np.nan]]), 1, ("float", "nan", "finite")),
        (np.array([[0, np.inf]]), 1, ("float", "inf", "finite")),
        (np.array([[0, 1]]), 1, ("int64", 0, 1, "data.range=[0, 1]", "--range 0 1")),
        (np.array([[True]]), 1, ("bool", "integers", "real numbers")),
        (GREY, 3, ("(2, 3)", "[height, width, 3]")),
        (GREY[..., None, None], 1, ("(2, 3, 1, 1)", "[height, width]")),
        (GREY[:0], 1, ("(0, 3)", "[height, width]")),
        (np.zeros((3, 2, 3)), 1, ("(3, 2, 3)", "[height, width, 1]", "[height, width]")),
    ],
)
def test_invalid_arrays(
    tmp_path: Path, array: np.ndarray, channels: int, parts: tuple[object, ...]
) -> None:
    np.save(tmp_path / "a.npy", array)
    assert is_about(refusal(tmp_path / "a.npy", channels), tmp_path / "a.npy", *parts)


def test_pickled_and_damaged_arrays_are_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}]]), allow_pickle=True)
    refusal(tmp_path / "a.npy", 1)
    np.savez(tmp_path / "b.npz", GREY)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    assert "magic string" in refusal(tmp_path / "b.npy", 1)
    np.save(tmp_path / "c.npy", GREY)
    (tmp_path / "c.npy").write_bytes((tmp_path / "c.npy").read_bytes()[:-1])
    refusal(tmp_path / "c.npy", 1)


def test_messages_are_printable(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", GREY)
    content = (tmp_path / "a.npy").read_bytes().replace(b"|u1", b"\x1b,m")
    (tmp_path / "a.npy").write_bytes(content)
    text = refusal(tmp_path / "a.npy", 1)
    assert text.isprintable()
    assert "x1b,m" in text


# --- images of several tiles


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_keep_every_value(tmp_path: Path, dtype: str, order: str) -> None:
    values = np.random.default_rng(0).random((520, 1030, 2))
    array = (values * {"u1": 255, "<u2": 65535, ">f4": 1}[dtype]).astype(dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    image = read_image(tmp_path / "a.npy", 2).permute(1, 2, 0)
    scale = np.float32(65535 if dtype == "<u2" else 1)
    np.testing.assert_array_equal(image, array if dtype == "u1" else array / scale)


@pytest.mark.parametrize(("value", "parts"), [(np.nan, ("nan", "finite")), (1.5, (0, 1.5))])
def test_one_invalid_value_at_the_end(
    tmp_path: Path, value: float, parts: tuple[object, ...]
) -> None:
    array = np.zeros((600, 600))
    array[-1, -1] = value
    np.save(tmp_path / "a.npy", array)
    assert is_about(refusal(tmp_path / "a.npy", 1), *parts)
