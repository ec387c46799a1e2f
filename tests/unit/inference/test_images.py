"""Images that are decoded ahead."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kl_vae.data import FolderSource, center_crop, read_image, resize_short_side, to_float
from kl_vae.inference.images import load_images, resize_and_crop
from tests.messages import is_about, mentions


@pytest.fixture
def source(tmp_path: Path, make_images: Callable[..., Path]) -> FolderSource:
    """Four images; the second is damaged and the last is large."""
    make_images(tmp_path, 3)
    make_images(tmp_path / "large", 1, size=(52, 40))
    (tmp_path / "001.png").write_bytes(b"no image")
    names = [f"{i:03d}.png" for i in range(3)]
    return FolderSource(tmp_path, [*names, "large/000.png"], channels=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_loaded_in_the_given_order(source: FolderSource, num_workers: int) -> None:
    order = [3, 1, 0, 2, 0]
    loaded = list(load_images(source, order, num_workers=num_workers))
    assert [image.index for image in loaded] == order
    for index, one in zip(order, loaded, strict=True):
        if index == 1:
            assert one.image is None and is_about(one.reason, "PNG", "JPEG")
            continue
        expected = to_float(read_image(source.root / source.paths[index], 3))
        assert one.reason == ""
        assert one.image is not None and one.image.dtype == torch.float32
        assert torch.equal(one.image, expected)


def test_workers_without_images(source: FolderSource) -> None:
    assert list(load_images(source, [], num_workers=2)) == []


def test_resize_and_crop(source: FolderSource, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    large, small = load_images(source, [3, 0], resize=30, crop=28, num_workers=1000)
    expected = center_crop(resize_short_side(source.read(3), 30), 28)
    assert large.image is not None and torch.equal(large.image, to_float(expected))
    assert small.image is not None and small.image.shape == (3, 28, 28)
    assert is_about(caplog.text, "num_workers=1000")  # reduced to the number of cores
    small, large = load_images(source, [0, 3], crop=33)
    assert small.image is None and is_about(small.reason, "24 x 20", "crop", 33)
    assert large.image is not None


def test_an_image_that_is_too_long_to_resize_is_an_error() -> None:
    with pytest.raises(ValueError, match=mentions("1 x 30000", "100 x 3000000")):
        resize_and_crop(torch.zeros(1, 30000, 1, dtype=torch.uint8), 100, None)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_arrays(tmp_path: Path, num_workers: int) -> None:
    array = np.random.default_rng(0).random((12, 9, 5), dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    source = FolderSource(tmp_path, ["a.npy"], channels=5)
    (loaded,) = load_images(source, [0], crop=8, num_workers=num_workers)
    assert loaded.image is not None
    np.testing.assert_allclose(loaded.image.permute(1, 2, 0), array[2:10, :8] * 2 - 1, atol=1e-6)


class Large(FolderSource):
    """Its images need 4 PiB, more than any machine has."""

    def read(self, index: int) -> torch.Tensor:
        return torch.empty(3, 2**48)


def test_an_image_that_does_not_fit_into_memory_is_skipped(tmp_path: Path) -> None:
    (loaded,) = load_images(Large(tmp_path, ["a.png"], channels=3), [0])
    assert loaded.image is None
    assert is_about(loaded.reason, "memory")


class Broken(FolderSource):
    """Raises an unexpected error."""

    def read(self, index: int) -> torch.Tensor:
        raise RuntimeError("a mistake")


def test_other_errors_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a mistake"):
        next(load_images(Broken(tmp_path, ["a.png"], channels=3), [0]))
