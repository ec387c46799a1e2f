"""Random access to images in tar shards."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae.data import (
    ImageDataset,
    ImageError,
    TarSource,
    batch_loader,
    open_root,
    read_image,
    validation_batches,
)
from tests.messages import is_about, mentions
from tests.shards import array, make_shards, picture, write_shard

IMAGE = picture(0)
with_workers = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def opened(root: Path | str, channels: int = 3, **options: object) -> TarSource:
    source = open_root(str(root), channels, **options)
    assert isinstance(source, TarSource)
    return source


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(content: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_random_access_matches_tarfile(tmp_path: Path) -> None:
    make_shards(tmp_path, shards=3, images=5)
    source = opened(tmp_path)
    expected = {}
    for shard in sorted(tmp_path.iterdir()):
        with tarfile.open(shard) as file:
            for member in file:
                if member.name.endswith(".png"):
                    expected[member.name] = file.extractfile(member).read()
    assert list(source.keys) == list(expected) == [source.key(i) for i in range(len(source))]
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        assert torch.equal(source.read(index), pixels(expected[source.key(index)]))
        assert source.size(index) == (16, 20)
        assert source.label_text(index) == str(index % 7)
    assert source.name(7) == f"{tmp_path}/train-0001.tar/00007.png"
    assert source.files == [tmp_path / f"train-000{i}.tar" for i in range(3)]


def test_shards_match_the_packed_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name, content in make_shards(tmp_path / "shards", shards=2, images=4).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    one, other = open_root(str(folder), 3), opened(tmp_path / "shards")
    assert one.fingerprint == other.fingerprint
    assert all(torch.equal(one.read(i), other.read(i)) for i in range(8))
    assert one.label_text(0) is None
    part = other.subset(np.array([6, 1]))
    assert [part.key(i) for i in range(len(part))] == ["00006.png", "00001.png"]
    assert torch.equal(part.read(0), other.read(6)) and part.label_text(0) == "6"
    assert part.fingerprint != other.fingerprint


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_layout(tmp_path: Path, format: int) -> None:
    longest = "a" * 90 + "/" + "b" * 80 + ".png"
    names = ["./x/1.png", "/y/2.png", "z//3.png", longest]
    if format != tarfile.USTAR_FORMAT:
        names += ["é" * 100 + ".png", "c/" * 100 + "d.png", os.fsdecode(b"caf\xe9.png")]
    write_shard(tmp_path / "a.tar", dict.fromkeys(names, IMAGE), format)
    source = opened(tmp_path / "a.tar")
    assert list(source.keys) == ["x/1.png", "y/2.png", "z/3.png", *names[3:]]
    assert all(source.read(i).shape == (3, 16, 20) for i in range(len(names)))
    assert source.name(len(names) - 1).isprintable()


def test_samples_folders_and_hidden_members(tmp_path: Path) -> None:
    members = {
        "a/1.input.png": IMAGE,
        "a/1.cls": b"3\n",
        "a/1.target.png": picture(1),
        "b/1.png": IMAGE,  # of another folder: without a class
        "._2.png": b"",
        "__MACOSX/3.png": b"",
        "notes.txt": b"",
    }
    source = opened(write_shard(tmp_path / "a.tar", members))
    assert list(source.keys) == ["a/1.input.png", "a/1.target.png", "b/1.png"]
    assert [source.label_text(i) for i in range(3)] == ["3", "3", None]
    chosen = opened(tmp_path / "a.tar", include=["a/*"], exclude=["*.target.png"])
    assert list(chosen.keys) == ["a/1.input.png"]


def labels(tmp_path: Path, *names: str) -> list[str | None]:
    """Return the labels of the images among the members; a label's content is its name."""
    members = {name: name.encode() if name.lower().endswith(".cls") else IMAGE for name in names}
    source = opened(write_shard(tmp_path / "a.tar", members))
    return [source.label_text(i) for i in range(len(source))]


def test_labels_of_names_with_dots(tmp_path: Path) -> None:
    names = [f"{folder}22.{n:02}" for folder in ("", "v1.0/") for n in (5, 6, 7)]
    members = [name + end for end in (".png", ".cls") for name in names]
    assert labels(tmp_path, *members) == [f"{name}.cls" for name in names]
    # a label of the same name up to the last dot comes first
    assert labels(tmp_path, "1.cls", "1.a.cls", "1.a.png", "1.png") == ["1.a.cls", "1.cls"]
    # WebDataset's: the same name up to the first dot
    assert labels(tmp_path, "1.png", "1.mask.png", "1.cls") == ["1.cls", "1.cls"]
    assert labels(tmp_path, "1.png", "1.class.cls") == ["1.class.cls"]
    # never the label of another image
    assert labels(tmp_path, "22.05.png", "22.05.cls", "22.06.png") == ["22.05.cls", None]


@pytest.mark.parametrize(
    "names",
    [
        ("1.png", "1.a.cls", "1.b.cls"),
        ("1.c.png", "1.a.cls", "1.cls"),
        ("1.png", "1.cls", "1.CLS"),
        ("1.a.png", "1.a.cls", "1.b.png", "1.b.cls", "1.c.png"),
    ],
)
def test_labels_of_two_candidates(tmp_path: Path, names: tuple[str, ...]) -> None:
    members = {name: b"3" if name.lower().endswith(".cls") else IMAGE for name in names}
    source = opened(write_shard(tmp_path / "a.tar", members))
    candidates = [name for name in names if name.lower().endswith(".cls")]
    index = len(source) - 1
    source = source.subset(np.array([index]))
    assert is_about(refusal(lambda: source.label_text(0)), source.name(0), *candidates)


def test_arrays(tmp_path: Path) -> None:
    rows = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    members = {
        "0.npy": array(rows),
        "1.npy": array(np.asfortranarray(rows.astype(">u2"))),
        "2.npy": array(rows)[:-1],
        "3.npy": array(np.array([[None]])),
        "4.npy": array(np.zeros((3, 0, 5))),
        "5.npy": array(rows)[:6] + b"\7" + array(rows)[7:],
        "6.npy": b"",
    }
    source = opened(write_shard(tmp_path / "a.tar", members), channels=5)
    np.testing.assert_array_equal(source.read(0), rows.transpose(2, 0, 1))
    assert source.size(1) == (2, 3)
    torch.testing.assert_close(source.read(1), source.read(0) / 65535)
    errors: list[tuple[object, ...]] = [
        ("30 bytes", 29),
        ("object", "uint8, uint16", "[0, 1]"),
        ("(3, 0, 5)", "[height, width]", "[height, width, channels]"),
        ("(7, 0)", "numpy.save"),
        ("empty",),
    ]
    for index, parts in enumerate(errors, 2):
        with pytest.raises(ImageError, match=mentions(f"{tmp_path}/a.tar/{index}.npy", *parts)):
            source.read(index)
    text = refusal(lambda: open_root(f"{tmp_path}/a.tar", 3))
    assert is_about(text, f"{tmp_path}/a.tar", ".jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff", 7)


def test_invalid_members_are_an_error_on_read(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"0.png": b"", "1.png": b"text", "2.png": IMAGE[:200]})
    with tarfile.open(path, "a") as shard:
        for number, (kind, target) in enumerate(
            [(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "4.png"), (tarfile.FIFOTYPE, "")],
            3,
        ):
            info = tarfile.TarInfo(f"{number}.png")
            info.type, info.linkname = kind, target
            shard.addfile(info)
        info = tarfile.TarInfo("6.png")
        info.size = len(IMAGE)
        shard.addfile(info, io.BytesIO(IMAGE))
    source = opened(path, max_pixels=320)
    regular = ("regular file", "tar --dereference --hard-dereference")
    errors: list[tuple[object, ...]] = [("empty",), ("JPEG", "PNG"), (), *3 * [regular]]
    for index, parts in enumerate(errors):
        with pytest.raises(ImageError, match=mentions(f"{path}/{index}.png", *parts)):
            source.read(index)
    assert source.read(6).shape == (3, 16, 20)
    with pytest.raises(ImageError, match=mentions("a.tar/6.png", "20 x 16", "max_pixels=9")):
        opened(path, max_pixels=9).read(6)
    with pytest.raises(ImageError, match=mentions("a.tar/1.png", "JPEG", "PNG")):
        source.size(1)


@pytest.mark.parametrize("format", ["BMP", "TIFF", "WEBP", "JPEG", "GIF"])
def test_formats_that_pillow_maps_or_reads_by_descriptor(tmp_path: Path, format: str) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(IMAGE)) as image:
        image.save(stream, format, **({"exif": exif} if format in ("JPEG", "WEBP") else {}))
    (tmp_path / "0.png").write_bytes(stream.getvalue())
    members = {"junk.txt": b"junk" * 999, "0.png": stream.getvalue(), "1.png": IMAGE}
    source = opened(write_shard(tmp_path / "a.tar", members))
    assert torch.equal(source.read(0), read_image(tmp_path / "0.png", 3))
    assert source.size(0) == tuple(source.read(0).shape[1:])


def test_invalid_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"0.png": IMAGE, "0.cls": b"\xff", "1.png": IMAGE, "1.cls": b"17"}
    source = opened(write_shard(tmp_path / "a.tar", members))
    error = refusal(lambda: source.label_text(0))
    assert is_about(error, f"{tmp_path}/a.tar/0.png", ".cls", "'utf-8' codec can't decode")
    monkeypatch.setattr("kl_vae.data.tar_shards.MAX_LABEL", 1)
    error = refusal(lambda: source.label_text(1))
    assert is_about(error, f"{tmp_path}/a.tar/1.png", ".cls", "2 bytes")


def test_a_changed_or_removed_shard(tmp_path: Path) -> None:
    make_shards(tmp_path, shards=2, images=2)
    source = opened(tmp_path)
    write_shard(tmp_path / "train-0000.tar", {"00000.png": IMAGE})
    (tmp_path / "train-0001.tar").unlink()
    for index, part in ((0, "changed"), (2, "No such file or directory")):
        with pytest.raises(ImageError, match=mentions(source.name(index), part)):
            source.read(index)


@with_workers
def test_worker_processes(tmp_path: Path) -> None:
    contents = make_shards(tmp_path, shards=4, images=3)
    source = opened(tmp_path)
    data = ImageDataset(source, 16, None, flip=False, seed=0, training=False)
    batches = validation_batches(len(data), 4, 0, 1)
    names = []
    for number, batch in enumerate(batch_loader(data, batches, 2, False, 60)):
        assert not batch.bad
        for row, image in enumerate(batch.images):
            assert torch.equal(image, data[0, 4 * number + row, 0].image)
        names += batch.names
    assert [name.rpartition("/")[2] for name in names] == list(contents)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.read(11), source.read(11))


# --- roots


def test_patterns_name_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "s", shards=4, images=1)
    monkeypatch.chdir(tmp_path)
    for pattern, expected in {
        "s/train-{0001..0003}.tar": [1, 2, 3],
        "s/train-{0003..0002}.tar": [2, 3],
        "s/*.tar": [0, 1, 2, 3],
        "s/train-000[13].tar": [1, 3],
        "s/{train-0000,train-0002,*3}.tar": [0, 2, 3],
        f"{tmp_path}/s/train-000{{0..1}}.tar": [0, 1],
        "s/train-0002.tar": [2],
    }.items():
        assert list(opened(pattern).keys) == [f"{number:05}.png" for number in expected], pattern
    make_shards(tmp_path / "[x]", shards=2, images=1)
    assert len(opened("[x]/train-{0000..0001}.tar")) == 2
    (tmp_path / "s" / "[1].tar").mkdir()  # an existing path is not a pattern
    (tmp_path / "s" / "[1].tar" / "a.png").write_bytes(IMAGE)
    assert list(open_root("s/[1].tar", 3).keys) == ["a.png"]


def test_invalid_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path, shards=2, images=1)
    (tmp_path / "a.png").write_bytes(IMAGE)
    monkeypatch.chdir(tmp_path)

    def text(pattern: str) -> str:
        return refusal(lambda: open_root(pattern, 3))

    pattern = "train-{0000..0009}.tar"
    assert is_about(text(pattern), pattern, "train-0002.tar", 7)
    assert is_about(text("x*.tar"), "x*.tar", "no such file")
    assert is_about(text("*"), "*", "a.png", ".tar")
    monkeypatch.setattr("kl_vae.data.roots.MAX_SHARDS", 100)
    assert is_about(text("{0..999999999}.tar"), "{0..999999999}.tar", 100)
    assert is_about(text("none.tar"), "none.tar", "No such file or directory")


def test_a_folder_of_both_images_and_shards(tmp_path: Path) -> None:
    make_shards(tmp_path, shards=1, images=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.png").write_bytes(IMAGE)
    (tmp_path / "c.npy").write_bytes(array(np.zeros((2, 2))))
    parts = (tmp_path, "train-0000.tar", "b/a.png", "'FOLDER/*.tar'", "exclude='*.tar'")
    assert is_about(refusal(lambda: open_root(str(tmp_path), 3)), *parts)
    assert list(open_root(str(tmp_path), 3, exclude=["*.tar"]).keys) == ["b/a.png"]
    assert len(opened(f"{tmp_path}/*.tar")) == 2
    (tmp_path / "b" / "a.png").unlink()
    assert len(opened(tmp_path)) == 2
    parts = ("include=['x*']", "exclude=[]", 2, f"{tmp_path}/train-0000.tar")
    assert is_about(refusal(lambda: open_root(str(tmp_path), 3, include=["x*"])), *parts)


def test_a_folder_of_compressed_shards(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    parts = (tmp_path, ".gz", "decompress")
    assert is_about(refusal(lambda: open_root(str(tmp_path), 3)), *parts)
