"""What it takes to list a large folder, and to say by a fingerprint that it is the same."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kl_vae.benchmark.timing import Timing
from kl_vae.data import FolderSource, open_root
from kl_vae.data.array_cache import VARIABLE
from kl_vae.data.listing_cache import CACHED_FILES, RACY_NS
from kl_vae.runtime.files import display_name

FILES_A_FOLDER = 1000
MARKER = ".kl_vae_benchmark"  # holds how many files were made

WITHOUT = "without the cache"
WRITTEN = "listed, and kept in the cache"
CACHED = "taken from the cache"


@dataclass(frozen=True)
class Measured:
    """One listing of a folder and the fingerprint of it, in a process of its own."""

    files: int
    listing: float  # seconds
    fingerprint: float  # seconds
    kept: int  # bytes, of names and sizes
    as_strings: int  # bytes that a list of `str` would take, without sizes
    peak: int  # bytes by which the process has grown at most


@dataclass(frozen=True)
class ListingResult:
    """What each way took, by name."""

    measured: dict[str, list[Measured]]

    def markdown(self) -> str:
        """A table: seconds as the median, lowest to highest, and memory a file."""
        rows = []
        for name, each in self.measured.items():
            listing, fingerprint = (
                Timing.of([getattr(one, key) for one in each]).cells
                for key in ("listing", "fingerprint")
            )
            peak = max(one.peak for one in each) / each[0].files
            rows.append(f"| {name} | {listing} | {fingerprint} | {peak:.0f} |")
        heading = "| | listing, s | lowest to highest | fingerprint, s | lowest to highest "
        first = next(iter(self.measured.values()))[0]
        return "\n".join(
            [
                heading + "| bytes a file at the peak |",
                "|---|---|---|---|---|---|",
                *rows,
                "",
                f"A file takes {first.kept / first.files:.0f} bytes of memory afterwards; its path "
                f"as a str in a list alone would take {first.as_strings / first.files:.0f}.",
            ]
        )


def check_folder(folder: Path, number: int) -> bool:
    """Whether the folder holds that many files of this benchmark, made by an earlier one.

    Raises:
        ValueError: it holds something else, or files of another number; or the number is too
            small to be kept in the cache.
    """
    if number < CACHED_FILES:
        raise ValueError(
            f"--files {number}: fewer than {CACHED_FILES:,} are not kept in the cache; measure "
            "with more"
        )
    marker = folder / MARKER
    made = marker.read_text(encoding="utf-8").strip() if marker.is_file() else ""
    if made == str(number):
        return True
    if made or (folder.exists() and any(folder.iterdir())):
        holds = f"{made} files of this benchmark" if made else "something else"
        raise ValueError(
            f"--folder {display_name(folder)}: holds {holds}; give an empty folder, or remove it"
        )
    return False


def make_files(folder: Path, number: int) -> Iterator[int]:
    """Make that many empty files in an empty folder; yield how many there are, now and then."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, number, FILES_A_FOLDER):
        inner = folder / f"{first // FILES_A_FOLDER:06}"
        inner.mkdir()
        last = min(first + FILES_A_FOLDER, number)
        for file in range(first, last):
            os.close(os.open(inner / f"{file:09}.jpg", os.O_CREAT | os.O_WRONLY))
        yield last
    (folder / MARKER).write_text(str(number), encoding="utf-8")


def measure_listing(folder: Path, repeats: int) -> ListingResult:
    """List a folder, by turns without the cache, into an empty one, and out of it.

    The system holds the folder's entries in memory, since they were read just before.
    """
    time.sleep(RACY_NS / 1e9)  # what has just been made is not trusted, and not kept
    measured: dict[str, list[Measured]] = {WITHOUT: [], WRITTEN: [], CACHED: []}
    # each in a fresh process, whose memory holds nothing of those before
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as cache:
                for name, place in ((WITHOUT, ""), (WRITTEN, cache), (CACHED, cache)):
                    measured[name].append(pool.apply(_measure, (folder, place)))
                assert os.listdir(cache)
    return ListingResult(measured)


def _measure(folder: Path, cache: str) -> Measured:
    os.environ[VARIABLE] = cache
    before = _peak()
    started = time.perf_counter()
    source = open_root(str(folder), channels=3)
    listed = time.perf_counter()
    _ = source.fingerprint
    ended = time.perf_counter()
    peak = _peak() - before
    assert isinstance(source, FolderSource) and source.sizes is not None
    return Measured(
        len(source),
        listed - started,
        ended - listed,
        source.sizes.nbytes + getattr(source.paths, "nbytes", 0),
        sum(8 + sys.getsizeof(path) for path in source.paths),
        peak,
    )


def _peak() -> int:
    """The most memory that this process has held so far, in bytes; 0 where nobody counts it."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
