"""Named data sets from tiny files in their published formats, and without a network."""

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, FashionMNIST

from kl_vae.data import DataConfig, ImageDataset, NamedSource, check_sizes
from tests.messages import is_about, mentions

NOWHERE = "http://127.0.0.1:9/"  # the discard port: refused at once


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 6), ("t10k", 4)):
        images = np.full((count, 28, 28), 50 * np.arange(count)[:, None, None], np.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte", np.zeros(count, np.uint8))
    return tmp_path


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict[str, object]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    # red, green and blue planes of 32 x 32, one after another
    planes = np.repeat(np.array([[200, 100, 50]], np.uint8), 1024, axis=1)  # [1,3072]
    batch = {"data": planes, "labels": [0]}
    names = [f"data_batch_{number}" for number in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", [[name, write(name, batch)] for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch)]])
    md5 = write("batches.meta", {"label_names": ["thing"]})
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})
    return tmp_path


def test_fashion_mnist(fashion: Path) -> None:
    training = NamedSource("fashion-mnist", fashion, training=True, channels=1)
    validation = NamedSource("fashion-mnist", fashion, training=False, channels=1)
    assert (len(training), len(validation)) == (6, 4)
    assert training.read(2).shape == (1, 28, 28)
    assert training.read(2).unique().tolist() == [100]
    assert training.size(2) == (28, 28)
    assert training.name(2) == "fashion-mnist train 2"
    assert training.label_text(2) is None
    assert training.fingerprint != validation.fingerprint
    grey = NamedSource("fashion-mnist", fashion, training=True, channels=3)
    assert grey.read(2).shape == (3, 28, 28)
    assert grey.read(2).unique().tolist() == [100]


def test_cifar10(cifar: Path) -> None:
    training = NamedSource("cifar10", cifar, training=True, channels=3)
    validation = NamedSource("cifar10", cifar, training=False, channels=3)
    assert (len(training), len(validation)) == (5, 1)
    assert training.read(0).shape == (3, 32, 32)
    assert training.read(0).dtype == torch.uint8
    assert training.read(4)[:, 7, 9].tolist() == [200, 100, 50]
    grey = NamedSource("cifar10", cifar, training=True, channels=1)
    assert grey.read(0).unique().tolist() == [124]  # .299 R + .587 G + .114 B


def test_samples_and_sizes(fashion: Path) -> None:
    source = NamedSource("fashion-mnist", fashion, training=True, channels=1)
    data = ImageDataset(source, crop=32, resize=32, flip=True, seed=0, training=True)
    assert len(check_sizes(data, DataConfig(), "training")) == len(data)
    assert data[0, 1, 0].image.shape == (1, 32, 32)
    small = ImageDataset(source, crop=32, resize=None, flip=True, seed=0, training=True)
    parts = ("fashion-mnist train 0", "28 x 28", 32, "data.resize", "data.crop")
    with pytest.raises(ValueError, match=mentions(*parts)):
        check_sizes(small, DataConfig(), "training")


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(CIFAR10, "url", NOWHERE)
    monkeypatch.setattr(FashionMNIST, "mirrors", [NOWHERE])
    with pytest.raises(ValueError) as caught:
        NamedSource(name, tmp_path, training=True, channels=3)
    assert is_about(str(caught.value), name, tmp_path, "Connection refused")
    assert "\n" not in str(caught.value)


def test_damaged_files(fashion: Path) -> None:
    raw = fashion / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:100])
    with pytest.raises(ValueError, match=mentions("fashion-mnist", fashion)):
        NamedSource("fashion-mnist", fashion, training=True, channels=1)


def test_unknown_names_and_channels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=mentions("'mnist'", "cifar10, fashion-mnist")):
        NamedSource("mnist", tmp_path, training=True, channels=1)
    with pytest.raises(ValueError, match=mentions("cifar10", 1, 3, 4, "channels", 2)):
        NamedSource("cifar10", tmp_path, training=True, channels=2)
