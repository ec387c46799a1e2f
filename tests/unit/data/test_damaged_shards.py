"""Tar files that are damaged, inconsistent, or name members outside their folder."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kl_vae.data import open_root, tar_shards
from tests.messages import is_about, mentions
from tests.shards import picture, write_shard

BLOCK = tarfile.BLOCKSIZE
IMAGE = picture(0)
BLOCKS = 1 + -(-len(IMAGE) // BLOCK)  # of one member


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_root(str(path), 3)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text.removeprefix(str(path))


def header(name: str = "0.png", **values: object) -> bytes:
    """A header block of any values with a valid checksum."""
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "a.tar", {f"{i}.png": IMAGE for i in range(3)})


def test_cut_at_any_length(shard: Path) -> None:
    content = shard.read_bytes()
    end = 3 * BLOCKS * BLOCK
    for length in [*range(0, end, BLOCK), 1, 511, end - 1, end]:
        shard.write_bytes(content[:length])
        assert re.search(r"\bbyte [\d,]+", refusal(shard))
    shard.write_bytes(content[:end])
    assert is_about(refusal(shard), "tar", f"byte {end:,}")
    shard.write_bytes(content[: end + BLOCK])
    assert len(open_root(str(shard), 3)) == 3


def test_garbage_in_place_of_a_header(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    start = BLOCKS * BLOCK
    content[start : start + BLOCK] = np.random.default_rng(0).bytes(BLOCK)
    shard.write_bytes(content)
    with tarfile.open(shard) as file:
        assert len(file.getmembers()) == 1  # tarfile alone loses two
    assert is_about(refusal(shard), f"byte {start:,}", "header")


def test_random_bytes_are_an_error_or_leave_all_images(shard: Path) -> None:
    content = shard.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(content)
        at = int(rng.integers(0, len(changed) - 16))
        changed[at : at + 16] = rng.bytes(16)
        shard.write_bytes(changed)
        try:
            source = open_root(str(shard), 3)
        except ValueError as error:
            assert str(error).startswith(str(shard))
        else:
            assert len(source) == 3


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (2**40, "1099511627776 bytes"),
        (2**70, "1180591620717411303424 bytes"),
        (-5, "-5 bytes"),
    ],
)
def test_wrong_sizes(tmp_path: Path, size: int, text: str) -> None:
    path = tmp_path / "a.tar"
    before = write_shard(path, {"a.png": IMAGE}).read_bytes()[: BLOCKS * BLOCK]
    path.write_bytes(before + header(size=size) + IMAGE)
    assert is_about(refusal(path), f"byte {len(before):,}", text)


def pax(records: bytes) -> bytes:
    padding = b"\0" * (-len(records) % BLOCK)
    return header("x", type=tarfile.XHDTYPE, size=len(records)) + records + padding


@pytest.mark.parametrize(
    ("extended", "text"),
    [
        (pax(b"11 size=-1\n"), "-1 bytes"),
        (pax(b"35 size=99999999999999999999999999\n"), "99999999999999999999999999 bytes"),
        (header("x", type=tarfile.XHDTYPE, size=2**21), "2097152 bytes"),
        (header("x", type=tarfile.GNUTYPE_LONGNAME, size=2**21), "2097152 bytes"),
    ],
)
def test_wrong_extended_headers(tmp_path: Path, extended: bytes, text: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(extended + header() + b"\0" * 1024)
    assert is_about(refusal(path), text)


@pytest.mark.parametrize(
    "records", [b"9 path=x", b"-3 path=x\n", b"99999999999999 path=x\n", b"7 path\n", b"0 a=b\n"]
)
def test_unreadable_extended_headers(tmp_path: Path, records: bytes) -> None:
    """Some versions of tarfile ignore them and find the member."""
    path = tmp_path / "a.tar"
    path.write_bytes(pax(records) + header() + b"\0" * 1024)
    try:
        assert len(open_root(str(path), 3)) == 1
    except ValueError as error:
        assert str(path) in str(error)


def test_extended_headers_without_a_member(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(20 * pax(b"12 path=0.x\n") + b"\0" * 1024)
    assert is_about(refusal(path), "byte 0")


@pytest.mark.parametrize("name", ["../0.png", "a/../../0.png", "/../0.png", "a/.."])
def test_names_outside_the_folder(tmp_path: Path, name: str) -> None:
    path = write_shard(tmp_path / "a.tar", {"1.png": IMAGE, name: IMAGE})
    assert is_about(refusal(path), f"'{name}'")


def test_duplicate_names(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"a/0.png": IMAGE, "./a/0.png": IMAGE})
    assert is_about(refusal(path), "a/0.png", 0, f"{BLOCKS * BLOCK:,}")


def test_the_number_of_members_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(tmp_path / "a.tar", {f"{i}.txt": b"" for i in range(9)} | {"a.png": b"x"})
    monkeypatch.setattr(tar_shards, "MAX_MEMBERS", 10)
    assert len(open_root(str(path), 3)) == 1
    monkeypatch.setattr(tar_shards, "MAX_MEMBERS", 9)
    assert is_about(refusal(path), 9, "members")


def test_sparse_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(type=tarfile.GNUTYPE_SPARSE) + b"\0" * 1024)
    assert is_about(refusal(path), "/0.png", "--sparse")
    path.write_bytes(pax(b"22 GNU.sparse.major=1\n") + header("b.png") + b"\0" * 1024)
    assert is_about(refusal(path), "/b.png", "--sparse")


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("gzip", b"\x1f\x8b\x08"),
        ("bzip2", b"BZh9"),
        ("xz", b"\xfd7zXZ\0"),
        ("zstd", b"\x28\xb5\x2f\xfd"),
    ],
)
def test_compressed_shards(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(start + b"\1" * 2000)
    assert is_about(refusal(path), name, "decompress")


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for content in (b"text" * 200, b""):
        path.write_bytes(content)
        assert is_about(refusal(path), "tar", "byte 0")
    write_shard(path, {"a.txt": b"text"})
    with pytest.raises(ValueError, match=mentions(path, ".jpg", ".tiff")):
        open_root(str(path), 3)


def test_concatenated_shards_and_special_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"comment": "global"}) as file:
        folder = tarfile.TarInfo("d")
        folder.type, folder.size = tarfile.DIRTYPE, 0
        file.addfile(folder)
        link = tarfile.TarInfo("l" * 150)
        link.type, link.linkname = tarfile.SYMTYPE, "t" * 150
        file.addfile(link)
        info = tarfile.TarInfo("d/0.png")
        info.size = len(IMAGE)
        file.addfile(info, io.BytesIO(IMAGE))
    first = path.read_bytes()
    # the size of a link is ignored; that of an unknown type is the size of its content
    odd = header("e", type=tarfile.LNKTYPE, size=5000) + header("f", type=b"Q", size=3) + b"abc"
    second = odd + b"\0" * 509 + write_shard(path, {"1.png": IMAGE}).read_bytes()
    path.write_bytes(first + second)
    source = open_root(str(path), 3)
    assert list(source.keys) == ["d/0.png", "1.png"]
    assert source.read(0).equal(source.read(1))
