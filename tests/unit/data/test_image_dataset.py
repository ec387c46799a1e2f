"""Samples of a folder: crops depend on the key only, errors are values."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae.data import FolderSource, ImageDataset, Wanted, list_images
from kl_vae.data.dataset import MAX_REPLACEMENTS
from tests.messages import is_about


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(20, 30), (16, 16), (40, 24)]):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def dataset(
    root: Path, crop: int = 16, resize: int | None = None, training: bool = True, **options: int
) -> ImageDataset:
    source = FolderSource(root, list_images(root, 3), channels=3, **options)
    return ImageDataset(source, crop, resize, flip=True, seed=0, training=training)


def test_a_training_sample(root: Path) -> None:
    data = dataset(root)
    assert len(data) == 3
    sample = data[3, 0, 17]
    assert sample.image.shape == (3, 16, 16)
    assert sample.image.dtype == torch.uint8
    assert sample.image.min() < 12 and sample.image.max() > 243
    assert (sample.position, sample.name, sample.bad) == (17, f"{root}/0.png", ())


def test_a_crop_is_a_part_of_the_image(root: Path) -> None:
    data = dataset(root)
    whole = data.source.read(0)
    patches = whole.unfold(1, 16, 1).unfold(2, 16, 1)  # [C,places,places,16,16]
    crop = data[0, 0, 0].image[:, None, None]
    same = [(patches == c).all(-1).all(-1).all(0).any() for c in (crop, crop.flip(-1))]
    assert sum(same) == 1


def test_draws_are_a_function_of_seed_epoch_and_index(root: Path) -> None:
    data = dataset(root)
    crops = [data[epoch, 2, 0].image for epoch in range(8)]
    for epoch in reversed(range(8)):
        assert torch.equal(dataset(root)[epoch, 2, 5].image, crops[epoch])
    assert len({crop.numpy().tobytes() for crop in crops}) > 4
    data.seed = 1
    assert any(not torch.equal(data[epoch, 2, 0].image, crops[epoch]) for epoch in range(8))


def test_draws_leave_the_global_generator_alone(root: Path) -> None:
    before = torch.get_rng_state()
    dataset(root)[0, 0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_no_flip(root: Path) -> None:
    data = dataset(root)
    data.flip = False
    whole = data.source.read(1)  # 16 x 16: there is one crop
    assert all(torch.equal(data[epoch, 1, 0].image, whole) for epoch in range(8))


def test_validation_takes_the_middle(root: Path) -> None:
    data = dataset(root, training=False)
    expected = data.source.read(0)[:, 2:18, 7:23]
    assert torch.equal(data[0, 0, 0].image, expected)
    assert torch.equal(data[5, 0, 0].image, expected)


def test_resize_comes_before_the_crop(root: Path) -> None:
    data = dataset(root, crop=32, resize=32)
    assert all(data[0, index, 0].image.shape == (3, 32, 32) for index in range(3))
    assert all(data[0, index, 0].name == f"{root}/{index}.png" for index in range(3))


def test_a_damaged_file_in_validation_gives_zeros(root: Path) -> None:
    (root / "1.png").write_bytes(b"damaged")
    sample = dataset(root, training=False)[0, 1, 4]
    assert sample.image.shape == (3, 16, 16)
    assert not sample.image.any()
    assert (sample.position, sample.name) == (4, "")
    ((name, reason),) = sample.bad
    assert name == f"{root}/1.png"
    assert is_about(reason, "JPEG", "PNG")


def test_a_damaged_file_in_training_is_replaced(root: Path) -> None:
    whole = dataset(root)
    (root / "1.png").write_bytes(b"damaged")
    data = dataset(root)
    chosen = set()
    for epoch in range(16):
        sample = data[epoch, 1, 4]
        assert sample.position == 4
        assert sample.image.any()
        assert {bad.name for bad in sample.bad} == {f"{root}/1.png"}
        again = dataset(root)[epoch, 1, 7]  # at another position
        assert torch.equal(sample.image, again.image)
        assert (sample.name, sample.bad) == (again.name, again.bad)
        chosen.add(sample.name)
        # other images are unchanged
        assert torch.equal(data[epoch, 0, 0].image, whole[epoch, 0, 0].image)
    assert chosen == {f"{root}/0.png", f"{root}/2.png"}


def test_replacements_are_limited(root: Path) -> None:
    for path in root.iterdir():
        path.write_bytes(b"damaged")
    sample = dataset(root)[0, 1, 4]
    assert sample.name == "" and not sample.image.any()
    assert {bad.name for bad in sample.bad} == {f"{root}/{i}.png" for i in range(3)}
    assert len(sample.bad) == 1 + MAX_REPLACEMENTS


def test_a_vanished_file_gives_the_reason(root: Path) -> None:
    data = dataset(root, training=False)
    (root / "1.png").unlink()
    assert data[0, 1, 0].bad == ((f"{root}/1.png", "No such file or directory"),)


@pytest.mark.parametrize("training", [True, False])
def test_a_small_image_gives_the_reason(root: Path, training: bool) -> None:
    sample = dataset(root, crop=20, training=training)[0, 1, 0]
    name, reason = sample.bad[0]
    assert name == f"{root}/1.png"
    assert is_about(reason, "16 x 16", 20, "data.resize", "data.crop")
    assert sample.image.shape == (3, 20, 20)


def test_max_pixels_reaches_the_reader(root: Path) -> None:
    sample = dataset(root, training=False, max_pixels=100)[0, 0, 0]
    assert is_about(sample.bad[0].reason, "max_pixels=100")


def test_fingerprint(root: Path) -> None:
    before = dataset(root).fingerprint
    assert before == dataset(root, crop=8).fingerprint
    Image.new("RGB", (16, 16)).save(root / "3.png")
    assert dataset(root).fingerprint != before


def test_a_dataset_can_be_sent_to_a_worker(root: Path) -> None:
    data = dataset(root)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[0, 0, 0].image, data[0, 0, 0].image)


def test_colours_differ_between_epochs(root: Path) -> None:
    data = dataset(root)
    data.flip, data.recolor = False, True
    whole = data.source.read(1)  # 16 x 16: there is one crop
    crops = [data[epoch, 1, 0].image for epoch in range(16)]
    for crop in crops:
        difference = crop.int().sum(dim=0) - whole.int().sum(dim=0)
        assert difference.abs().max() <= 3
    assert 2 < sum(not torch.equal(crop, whole) for crop in crops) < 14
    assert all(torch.equal(crop, data[epoch, 1, 0].image) for epoch, crop in enumerate(crops))
    data.training = False
    assert torch.equal(data[3, 1, 0].image, whole)


class IndexAlone:
    """A user's source, whose `read` takes only an index."""

    channels, fingerprint = 3, "0" * 32

    def __init__(self, source: FolderSource) -> None:
        self.source = source
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> torch.Tensor:
        return self.source.read(index)


@pytest.mark.parametrize("resize", [None, 18])
def test_sources_may_take_only_an_index(root: Path, resize: int | None) -> None:
    data = dataset(root, resize=resize)
    own = ImageDataset(IndexAlone(data.source), 16, resize, True, 0, training=True, draft=True)
    for index in range(3):
        assert torch.equal(own[4, index, 0].image, data[4, index, 0].image)


@pytest.mark.parametrize("training", [True, False])
def test_only_the_crop_is_converted(
    root: Path, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    data = dataset(root, training=training)
    shapes, read = [], data.source.read

    def noting(index: int, wanted: Wanted) -> torch.Tensor:
        image = read(index, wanted)
        shapes.append(tuple(image.shape))
        assert image.untyped_storage().nbytes() == image.numel()
        return image

    monkeypatch.setattr(data.source, "read", noting)
    assert not any(data[0, index, 0].bad for index in range(3))
    assert shapes == [(3, 16, 16)] * 3
