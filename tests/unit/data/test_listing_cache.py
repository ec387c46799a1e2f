"""What is kept of a folder's list, and when that holds no longer."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kl_vae.data import array_cache, list_images, listing_cache, open_root, tar_index
from kl_vae.data.listing_cache import cached_scan
from kl_vae.data.split import fingerprint
from tests.shards import make_shards, picture, write_shard

FILES = ["a/1.png", "a/2.png", "b/c/3.png", "é.png"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the cache; what is small is kept as well, and what has just changed."""
    monkeypatch.setenv("KL_VAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing_cache, "CACHED_FILES", 1)
    monkeypatch.setattr(listing_cache, "RACY_NS", 0)
    monkeypatch.setattr(tar_index, "CACHED_IMAGES", 1)
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number, name in enumerate(FILES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1" * number)
    (root / "notes.txt").write_bytes(b"")
    (root / "b" / "gone.png").symlink_to("nowhere")
    return root


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders that were gone through."""
    scanned: list[Path] = []
    scan = listing_cache.scan_folder

    def scan_folder(root: Path) -> object:
        scanned.append(root)
        return scan(root)

    monkeypatch.setattr(listing_cache, "scan_folder", scan_folder)
    yield scanned


def listed(root: Path) -> list[str]:
    """The list, after which its fingerprint is what it would be without a cache."""
    source = open_root(str(root), 3)
    assert source.fingerprint == fingerprint(root, list(source.keys))
    return list(source.keys)


def test_a_second_listing_is_the_first(cache: Path, root: Path, scans: list[Path]) -> None:
    expected = sorted([*FILES, "b/gone.png"], key=os.fsencode)
    assert listed(root) == expected
    assert listed(root) == expected == list_images(root, 3)
    assert len(scans) == 1
    (root.parent / "link").symlink_to(root)
    assert listed(root.parent / "link") == expected
    assert len(scans) == 1
    assert listed(root / "a") == ["1.png", "2.png"]
    assert len(scans) == 2
    assert len(list(cache.iterdir())) == 2


def test_patterns_and_errors_are_those_without_a_cache(
    cache: Path, root: Path, scans: list[Path]
) -> None:
    for _ in range(2):
        assert list(open_root(str(root), 3, ["a/*"], ["2*"]).keys) == ["a/1.png"]
        with pytest.raises(ValueError, match=r"for .npy; it holds 6 other files \(5 .png, 1 .txt"):
            open_root(str(root), 7)
    assert len(scans) == 1


@pytest.mark.parametrize("change", ["add", "remove", "rename", "touch", "folder", "link", "swap"])
def test_changes_that_are_noticed(cache: Path, root: Path, scans: list[Path], change: str) -> None:
    (root / "z").symlink_to(root.parent / "elsewhere")
    for place in ("elsewhere", "other"):
        (root.parent / place).mkdir()
        (root.parent / place / f"{place}.png").write_bytes(b"")
    before = listed(root)
    assert "z/elsewhere.png" in before
    if change == "add":
        (root / "b" / "c" / "4.png").write_bytes(b"")
    elif change == "remove":
        (root / "a" / "1.png").unlink()
    elif change == "rename":
        (root / "a" / "1.png").rename(root / "a" / "9.png")
    elif change == "touch":
        os.utime(root / "a", ns=(0, 0))
    elif change == "folder":
        (root / "b").rename(root / "y")
    elif change == "link":
        (root.parent / "elsewhere" / "5.png").write_bytes(b"")
    else:
        (root.parent / "elsewhere").rename(root.parent / "gone")
        (root.parent / "other").rename(root.parent / "elsewhere")
    assert (listed(root) == before) == (change == "touch")
    assert len(scans) == 2


def test_a_time_of_modification_that_was_set_back(cache: Path, root: Path) -> None:
    before, status = listed(root), os.stat(root / "a")
    (root / "a" / "0.png").write_bytes(b"")
    os.utime(root / "a", ns=(status.st_atime_ns, status.st_mtime_ns))  # as tar and rsync do
    assert listed(root) == ["a/0.png", *before]


def test_a_file_written_anew_in_its_place_is_not_noticed(cache: Path, root: Path) -> None:
    """Which the documentation says."""
    before = open_root(str(root), 3).fingerprint
    (root / "a" / "1.png").write_bytes(b"another size")
    assert open_root(str(root), 3).fingerprint == before
    assert open_root(str(root), 3, cache=False).fingerprint != before


def test_what_has_just_changed_is_not_kept(
    cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(listing_cache, "RACY_NS", 2_000_000_000)
    listed(root)
    assert not cache.exists()
    assert "5 files were listed, and may still be changing" in caplog.text
    later = time.time_ns() + 2_100_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    listed(root)
    assert cache.exists()


def test_small_folders_and_small_shards_are_not_kept(
    cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_cache, "CACHED_FILES", 6)
    monkeypatch.setattr(tar_index, "CACHED_IMAGES", 2)
    listed(root)
    open_root(str(write_shard(root.parent / "a.tar", {"a.png": picture(0)})), 3)
    assert not cache.exists()


def test_where_the_cache_is(
    root: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert array_cache.cache_folder() == cache
    monkeypatch.setenv("KL_VAE_CACHE", "")
    assert array_cache.cache_folder() is None
    listed(root)
    assert not cache.exists()
    monkeypatch.delenv("KL_VAE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert array_cache.cache_folder() == tmp_path / "xdg" / "kl_vae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert array_cache.cache_folder() == tmp_path / "home" / ".cache" / "kl_vae"
    cached_scan(root)
    assert len(list((tmp_path / "home" / ".cache" / "kl_vae").iterdir())) == 1
    open_root(str(root), 3, cache=False)


def test_a_cache_that_cannot_be_written_is_a_line_in_the_log(
    root: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_bytes(b"a file")
    expected = listed(root)
    (line,) = caplog.messages
    assert line == (
        f"'{cache}': cannot be written (File exists), so that the next run lists its images again; "
        "set KL_VAE_CACHE to a folder that can, or to nothing"
    )
    assert listed(root) == expected


def test_a_damaged_or_foreign_cache_is_not_used(
    cache: Path, root: Path, scans: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = listed(root)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    middle = len(whole) // 2
    contents = [b"", whole[:middle], whole[:-1], whole[:200] + b"damaged" + whole[207:]]
    for content in contents:
        kept.write_bytes(content)
        assert listed(root) == expected
    assert len(scans) == 1 + len(contents)
    assert kept.read_bytes() == whole
    monkeypatch.setattr(array_cache, "VERSION", 2)  # another version's
    assert listed(root) == expected
    assert len(scans) == 2 + len(contents)
    other = root.parent / "another"
    other.mkdir()
    (other / "x.png").write_bytes(b"")
    listed(other)
    (foreign,) = set(cache.iterdir()) - {kept}
    foreign.replace(kept)
    assert listed(root) == expected


def _list_often(root: Path, cache: str) -> None:
    os.environ["KL_VAE_CACHE"] = cache
    for _ in range(30):
        assert len(listing_cache.scan_folder(root).files) == len(cached_scan(root).files)
        for kept in Path(cache).glob("*.npz"):
            kept.unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_processes_that_write_one_cache(cache: Path, root: Path, scans: list[Path]) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_list_often, args=(root, str(cache))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(listed(root)) == 5
    assert len(scans) == 1
    assert not [path for path in cache.iterdir() if path.suffix != ".npz"]


# --- shards


def test_shards_are_gone_through_once_each(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    make_shards(shards, shards=2, images=3)
    gone_through: list[str] = []
    read = tar_index.read_members

    def read_members(shard: Path) -> object:
        gone_through.append(shard.name)
        return read(shard)

    monkeypatch.setattr(tar_index, "read_members", read_members)
    first, again = open_root(str(shards), 3), open_root(str(shards), 3)
    assert sorted(gone_through) == ["train-0000.tar", "train-0001.tar"]
    assert list(first.keys) == list(again.keys) and first.fingerprint == again.fingerprint
    assert [again.label_text(i) for i in range(6)] == list("012345")
    assert again.read(4).equal(first.read(4))
    write_shard(shards / "train-0001.tar", {"x.png": picture(7)})
    assert open_root(str(shards), 3).key(3) == "x.png"
    assert gone_through[2:] == ["train-0001.tar"]
    open_root(str(shards), 3, cache=False)
    assert len(gone_through) == 5
