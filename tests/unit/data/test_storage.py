"""A storage that fails is told apart from bad files, and tried again."""

from __future__ import annotations

import errno
import io
from functools import partial
from pathlib import Path

import pytest

from kl_vae import train
from kl_vae.data import FolderSource, ImageDataset, Source, batch_loader, decoding, open_root
from kl_vae.data.decoding import ImageError, inspect_from, read_image_from, read_size_from
from kl_vae.runtime.distributed import TRAINING, explain
from kl_vae.runtime.errors import RunError, StorageError
from tests.messages import is_about, mentions
from tests.shards import picture, write_shard

STORAGE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE)

# Python 3.12 warns of every fork in a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which take no time."""
    slept: list[float] = []
    monkeypatch.setattr(decoding.time, "sleep", slept.append)
    return slept


class Failing(io.BytesIO):
    """A stream whose reads fail from byte 16 on, within the readers of all formats."""

    def __init__(self, content: bytes, number: int) -> None:
        super().__init__(content)
        self.number = number

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= 16 or size is None or size < 0:
            raise OSError(self.number, "the storage is gone")
        return super().read(size)


def opener(fails: int, number: int, opened: list[int], at_open: bool = True) -> io.BytesIO:
    """Open an image; the first `fails` times it fails."""
    opened.append(1)
    if len(opened) > fails:
        return io.BytesIO(picture(0))
    if at_open:
        raise OSError(number, "the storage is gone")
    return Failing(picture(0), number)


@pytest.mark.parametrize("at_open", [True, False])
@pytest.mark.parametrize("number", STORAGE)
@pytest.mark.parametrize("fails", [1, 3, 4])
def test_a_failed_read_is_tried_again_with_longer_waits(
    fails: int, number: int, at_open: bool, waits: list[float]
) -> None:
    opened: list[int] = []
    open_stream = partial(opener, fails, number, opened, at_open)
    if fails < 4:
        assert read_image_from(open_stream, "a.png", 3).shape == (3, 16, 20)
    else:
        with pytest.raises(StorageError, match=mentions("a.png", "the storage is gone")):
            read_image_from(open_stream, "a.png", 3)
    assert len(opened) == min(fails + 1, 4)
    assert waits == [1.0, 2.0, 4.0][:fails]


def test_every_reader_tells_the_storage_apart() -> None:
    for read in (read_size_from, inspect_from, partial(read_image_from, channels=3)):
        with pytest.raises(StorageError):
            read(partial(opener, 9, errno.EIO, []), "a.png")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG])
def test_other_errors_are_of_the_file(number: int, waits: list[float]) -> None:
    with pytest.raises(ImageError):
        read_image_from(partial(opener, 9, number, []), "a.png", 3)
    assert waits == []


def folder(root: Path) -> FolderSource:
    for number in range(4):
        (root / "inner").mkdir(parents=True, exist_ok=True)
        (root / f"inner/{number}.png").write_bytes(picture(number))
    source = open_root(str(root), 3)
    assert isinstance(source, FolderSource)
    return source


@pytest.mark.parametrize("emptied", [True, False], ids=["empty", "missing"])
@pytest.mark.parametrize("shards", [True, False], ids=["shards", "folder"])
def test_a_root_that_disappears_is_no_bad_image(
    tmp_path: Path, shards: bool, emptied: bool
) -> None:
    root = tmp_path / "mount"
    source: Source
    if shards:
        source = open_root(str(write_shard(root / "a.tar", {"0.png": picture(0)})), 3)
    else:
        source = folder(root)
    dataset = ImageDataset(source, 8, None, False, 0, training=True)
    assert dataset[0, 0, 0].bad == ()
    root.rename(tmp_path / "elsewhere")
    if emptied:
        root.mkdir()
    with pytest.raises(StorageError, match=mentions(source.name(0), root)):
        dataset[0, 0, 0]


def test_a_file_that_disappears_is_a_bad_image(tmp_path: Path) -> None:
    dataset = ImageDataset(folder(tmp_path), 8, None, False, 0, training=True)
    (tmp_path / "inner/2.png").unlink()
    (bad, *_) = dataset[0, 2, 0].bad
    assert bad.name.endswith("inner/2.png")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_error_of_a_run_is_one_line_that_says_how_to_resume(
    num_workers: int, tmp_path: Path
) -> None:
    dataset = ImageDataset(folder(tmp_path / "mount"), 8, None, False, 0, training=True)
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError) as caught:
        list(batch_loader(dataset, [[(0, 1, 0)]], num_workers, False, 60))
    explained = explain(caught.value)
    assert isinstance(explained, RunError) and "\n" not in str(explained)
    name = tmp_path / "mount/inner/1.png"
    assert is_about(str(explained), name, "storage", TRAINING.images, TRAINING.resume)
    assert "Traceback" not in str(explained)


def test_a_run_ends_without_bad_images_and_is_resumed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    overrides = ["training.max_steps=2"]
    with monkeypatch.context() as broken:
        broken.setattr(decoding.PngReader, "load", fail)
        text = mentions("storage", "images/", "Input/output error", TRAINING.resume)
        with pytest.raises(RunError, match=text):
            train("tiny.yaml", "run", overrides=overrides, device="cpu")
    assert not Path("run/bad_images.txt").exists()
    assert train("tiny.yaml", "run", overrides=overrides, device="cpu").step == 2
