"""Sizes of all images, read before a run starts; rectangular crops."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae.data import (
    DataConfig,
    FolderSource,
    ImageDataset,
    check_sizes,
    list_images,
    open_root,
    read_sizes,
)
from tests.messages import is_about, mentions
from tests.shards import picture, write_shard

SIZES = [(20, 30), (16, 16), (40, 24), (64, 48)]  # (height, width)
with_workers = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, (height, width) in enumerate(SIZES):
        (tmp_path / f"{number}.png").write_bytes(picture(number, width, height))
    return tmp_path


def check(root: Path, **options: object) -> ImageDataset:
    """Return the dataset of the images that are kept."""
    config = DataConfig(**options)
    source = FolderSource(root, list_images(root, 3), channels=3)
    dataset = ImageDataset(source, config.crop or 16, config.resize, False, 0, True)
    dataset.keep(check_sizes(dataset, config, "training"))
    return dataset


def names(dataset: ImageDataset) -> list[str]:
    return [dataset.source.key(index) for index in range(len(dataset))]


def test_sizes_of_a_folder_and_of_shards(root: Path) -> None:
    (root / "4.png").write_bytes(b"damaged")
    members = {path.name: path.read_bytes() for path in sorted(root.iterdir())}
    shard = write_shard(root / "x" / "a.tar", members)
    for source in (FolderSource(root, list(members), 3), open_root(str(shard), 3)):
        assert read_sizes(source).tolist() == [[*size] for size in [*SIZES, (0, 0)]]


@with_workers
def test_sizes_of_many_images_are_read_by_workers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kl_vae.data.sizes._BATCH", 3)
    state = torch.get_rng_state()
    source = FolderSource(root, list_images(root, 3), channels=3)
    assert read_sizes(source, num_workers=2).tolist() == [[*size] for size in SIZES]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_smaller_than_the_crop_is_an_error(root: Path) -> None:
    assert len(check(root, crop=16)) == 4
    parts = ("2 of 4", f"{root}/1.png", "16 x 16", 22, "data.resize", "data.min_size", "data.crop")
    with pytest.raises(ValueError, match=mentions(*parts)):
        check(root, crop=22)
    (root / "0.png").write_bytes(b"damaged")
    (root / "1.png").write_bytes(b"damaged")
    assert len(check(root, crop=22)) == 4  # an error on read only


def test_every_image_is_looked_at_however_many_there_are(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(root, ["0.png"] * 12_000, channels=3)
    sizes = {11_998: (8, 90)}
    monkeypatch.setattr(source, "size", lambda index: sizes.get(index, (16, 16)))
    dataset = ImageDataset(source, 16, None, flip=False, seed=0, training=True)
    config = DataConfig(num_workers=0)
    with pytest.raises(ValueError, match=mentions("1 of 12000", "90 x 8")):
        check_sizes(dataset, config, "training")


@pytest.mark.parametrize(
    ("min_size", "kept"),
    [(16, "0123"), (17, "023"), (24, "23"), ((30, 20), "23"), ((20, 30), "03"), ((16, 16), "0123")],
)
def test_smaller_images_are_skipped(
    root: Path, caplog: pytest.LogCaptureFixture, min_size: object, kept: str
) -> None:
    with caplog.at_level(logging.INFO):
        assert names(check(root, min_size=min_size)) == [f"{number}.png" for number in kept]
    shown = list(min_size) if isinstance(min_size, tuple) else min_size
    if len(kept) < 4:
        assert is_about(caplog.text, f"data.min_size={shown}", f"{4 - len(kept)} of 4 training")
    else:
        assert not caplog.text


def test_min_size_that_no_image_has(root: Path) -> None:
    with pytest.raises(ValueError, match=mentions("data.min_size=65", "4 of 4", "16 x 16")):
        check(root, min_size=65)


def test_enlarging_is_reported_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(root, resize=24)
    (message,) = caplog.messages
    assert is_about(message, "data.resize=24", "2 of 4", f"{root}/1.png", "16 x 16", "1.5")
    caplog.clear()
    check(root, resize=24, min_size=24)
    check(root, resize=16)
    assert not caplog.messages


def test_images_of_too_many_pixels_are_found(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = ("data.max_pixels=1000", "1 of 4", f"{root}/3.png", "48 x 64")
    assert len(check(root, max_pixels=1000, max_bad_fraction=0.25)) == 4
    assert is_about(caplog.text, *parts)
    with pytest.raises(ValueError, match=mentions(*parts, "data.max_bad_fraction=0.2")):
        check(root, max_pixels=1000, max_bad_fraction=0.2)


# --- rectangles


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("resize", [None, 24])
def test_rectangular_crops(root: Path, training: bool, resize: int | None) -> None:
    source = FolderSource(root, ["2.png", "3.png"], channels=3)
    dataset = ImageDataset(source, (32, 16), resize, flip=False, seed=0, training=training)
    assert dataset.crop_size == (32, 16)
    for index in range(2):
        sample = dataset[0, index, 0]
        assert sample.image.shape == (3, 32, 16) and not sample.bad
    if resize is None:
        whole = source.read(0)
        patches = whole.unfold(1, 32, 1).unfold(2, 16, 1)  # [C,9,9,32,16]
        same = (patches == dataset[0, 0, 0].image[:, None, None]).all(-1).all(-1).all(0)
        places = torch.nonzero(same).tolist()
        assert len(places) == 1 and (training or places == [[4, 4]])
    bad = ImageDataset(FolderSource(root, ["0.png"], 3), (32, 16), None, False, 0, False)[0, 0, 0]
    assert bad.image.shape == (3, 32, 16)
    assert is_about(bad.bad[0].reason, "30 x 20", "[32, 16]", "data.crop")


def test_rectangular_crops_are_compared_with_both_sides(root: Path) -> None:
    assert len(check(root, crop=(20, 24), min_size=(20, 24))) == 3
    with pytest.raises(ValueError, match=mentions("1 of 4", "0.png", "30 x 20", "[24, 16]")):
        check(root, crop=(24, 16), min_size=17, **{})
    # resized to a short side of 20: 20 x 30, 20 x 20, 33 x 20, 27 x 20
    with pytest.raises(ValueError, match=mentions("2 of 4", "[21, 20]", "data.resize")):
        check(root, crop=(21, 20), resize=20)
    assert len(check(root, crop=(21, 20), resize=21)) == 4


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"crop": (16,)}, ("crop=[16]", "[height, width]")),
        ({"crop": (16, 16, 16)}, ("crop=[16, 16, 16]", "[height, width]")),
        ({"crop": (16, 0)}, ("crop=[16, 0]", 1)),
        ({"min_size": 0}, ("min_size=0", 1)),
        ({"min_size": (1, 2, 3)}, ("min_size=[1, 2, 3]",)),
        ({"resize": 12, "crop": (32, 16)}, ("resize=12", "[32, 16]", 16)),
        ({"name": "cifar10", "min_size": 12}, ("min_size=12", "cifar10")),
    ],
)
def test_invalid_sizes(options: dict[str, object], parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        DataConfig(**options)


def test_files_of_one_pixel_and_of_arrays(tmp_path: Path) -> None:
    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.zeros((7, 9), np.uint8))
    source = open_root(str(tmp_path), 1, include=["*.npy", "*.png"])
    assert read_sizes(source).tolist() == [[1, 1], [7, 9]]
