"""Numbered units of work, shared by any number of ranks, with a progress bar and resumption.

The result of a unit depends only on the unit, not on the rank or the number of ranks. A command
that is killed and resumed on a different number of ranks therefore gives the same results.
"""

from __future__ import annotations

import errno
import json
import logging
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.files import (
    display_name,
    flush_files,
    flush_folder,
    remove_temporaries,
    write_text_atomically,
)
from kl_vae.runtime.locks import lock_file, remove_lock
from kl_vae.runtime.schema import printable, show

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0  # interval of log lines if no progress bar is shown
FOLDER = ".unfinished"
UNFINISHED = f"{FOLDER}/identity.json"  # in an output folder, while there is unfinished work
_LOCK = ".lock"


def units_of(number: int, size: int) -> list[range]:
    """Split the images 0 to `number` - 1 into units of `size` images; the last may be smaller.

    Raises:
        ValueError: `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"size={size}: give at least 1 image per unit")
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


@contextmanager
def show_progress(total: int, ranks: Ranks) -> Iterator[Callable[[int], None]]:
    """Show the progress of rank 0: a bar if stderr is a terminal, otherwise a log line every 30 s.

    Yields:
        A function that takes the number of images processed since its last call.
    """
    title = f"rank 0 of {ranks.world_size}" if ranks.world_size > 1 else None
    hidden = None if ranks.is_rank_zero else True  # None: hidden unless stderr is a terminal
    bar = tqdm(total=total, unit="image", desc=title, disable=hidden)
    done, last_log = 0, time.monotonic()

    def update(number: int) -> None:
        nonlocal done, last_log
        done += number
        bar.update(number)
        if bar.disable and ranks.is_rank_zero and time.monotonic() - last_log >= LOG_SECONDS:
            last_log = time.monotonic()
            logger.info("%s%d of %d images", f"{title}: " if title else "", done, total)

    with logging_redirect_tqdm(), bar:
        yield update


class Progress:
    """Records of finished units, one file each in `OUT/.unfinished` until all units are finished.

    As a context manager, it releases the lock of the output folder at the end.

    Args:
        out: output folder of the command; rank 0 creates and locks it.
        identity: everything that the results depend on, as plain values; resumed work must have
            the same identity.
        resume: continue unfinished work in `out`.
        ranks: the ranks of the command; all of them must call this.
        overwrite: discard unfinished work, and replace a finished result.
        files: returns the files of a finished unit in `out`, by its number and record.
        finished: returns the identity of the finished result in `out`, empty if it is unknown, or
            None if there is no result; called on rank 0 before anything is written, unless
            `overwrite` is true.

    Attributes:
        identity: the identity as JSON values, to be stored in the result.

    Raises:
        ValueError: `out` contains unfinished work and `resume` is false or the identity differs; or
            a finished result of another identity; or another process works in it; or it cannot be
            written to.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        resume: bool,
        ranks: Ranks,
        *,
        overwrite: bool = False,
        files: Callable[[int, Any], Iterable[Path]] = lambda unit, record: (),
        finished: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        if resume and overwrite:
            raise ValueError("resume=True, overwrite=True: give only one of them")
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._out = out
        self._folder = out / FOLDER
        self._files = files
        self._ranks = ranks
        self._lock: int | None = None  # a file descriptor, on rank 0
        ranks.on_rank_zero(lambda: self._begin(resume, overwrite, finished))

    def share(self, number: int) -> list[int]:
        """Return this rank's share of the unfinished units among 0 to `number` - 1.

        A unit is finished if all its files exist and have the recorded sizes.
        """
        missing = self._ranks.on_rank_zero(
            lambda: [unit for unit in range(number) if not self._is_finished(unit)]
        )
        return missing[self._ranks.rank :: self._ranks.world_size]

    def write(self, unit: int, record: Any) -> None:
        """Record that a unit is finished, once its files are on disk; they have been written.

        Args:
            unit: number of the unit.
            record: JSON values; numbers must be finite.

        Raises:
            ValueError: the record cannot be written, or a file cannot be written to disk.
        """
        files = list(self._files(unit, record))
        try:
            flush_files(files, self._out)
            sizes = {path.relative_to(self._out).as_posix(): path.lstat().st_size for path in files}
            content = {"result": record, "files": sizes}
            text = json.dumps({**content, "checksum": _checksum(content)}, allow_nan=False)
            write_text_atomically(self._record(unit), text)
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def find(self, unit: int) -> Any:
        """Return the record of a unit, or None if it is unfinished."""
        record = self._load(unit)
        return None if record is None else record["result"]

    def read(self, number: int) -> Iterator[Any]:
        """Yield the records of the units 0 to `number` - 1, all of which must be finished."""
        for unit in range(number):
            yield json.loads(self._record(unit).read_text(encoding="utf-8"))["result"]

    def path(self, unit: int, suffix: str) -> Path:
        """Return the path for non-JSON data of a unit, which is kept until `close`."""
        return self._record(unit).with_suffix(suffix)

    def close(self, results: Iterable[Path] = ()) -> None:
        """Delete the records, once the files of the result are on disk; only rank 0 calls this.

        Raises:
            ValueError: a file cannot be written to disk.
        """
        try:
            flush_files(results, self._out)
        except OSError as error:
            raise _unwritable(self._out, error) from error
        self._remove_records()
        self._release()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _record(self, unit: int) -> Path:
        return self._folder / f"{unit:07d}.json"

    def _load(self, unit: int) -> dict[str, Any] | None:
        """Return what `write` recorded; None if that is missing, damaged or of version 0.1."""
        try:
            record = json.loads(self._record(unit).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        if not isinstance(record, dict) or record.keys() != {"result", "files", "checksum"}:
            return None
        checksum = record.pop("checksum")
        return record if _checksum(record) == checksum else None

    def _is_finished(self, unit: int) -> bool:
        record = self._load(unit)
        if record is None:
            return False
        for name, size in record["files"].items():
            if _file_size(self._out / name) != size:
                logger.warning(
                    "%s: missing or incomplete; it will be written again", display_name(name)
                )
                return False
        return True

    def _begin(
        self, resume: bool, overwrite: bool, finished: Callable[[], Mapping[str, Any] | None]
    ) -> None:
        try:
            _make_folders(self._folder)
            self._lock = lock_file(self._folder / _LOCK)
        except BlockingIOError:
            raise ValueError(
                f"{display_name(self._out)}: another process is writing to this folder; wait until "
                "it ends, or give another --out"
            ) from None
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        try:
            if overwrite:
                self._remove_records()
            else:
                self._check(resume, finished())
            try:
                remove_temporaries(self._out)
                remove_temporaries(self._folder)
                write_text_atomically(self._out / UNFINISHED, json.dumps(self.identity))
            except OSError as error:
                raise _unwritable(self._folder, error) from error
        except BaseException:
            self._release()
            raise

    def _check(self, resume: bool, finished: Mapping[str, Any] | None) -> None:
        """Raise ValueError if unfinished work or a finished result must not be touched."""
        name = display_name(self._folder)
        if (self._out / UNFINISHED).exists():
            if not resume:
                raise ValueError(
                    f"{name}: an earlier command did not finish; give --resume to continue it, or "
                    "--overwrite to start over"
                )
            changed = differences(_read_identity(self._out / UNFINISHED), self.identity)
            if changed:
                raise ValueError(
                    f"{name}: unfinished work with different settings ({changed}); use the same "
                    "settings to resume it, --overwrite to start over, or another --out"
                )
        elif finished is not None and finished != self.identity:
            changed = differences(finished, self.identity) if finished else "it does not state any"
            raise ValueError(
                f"{display_name(self._out)}: contains a result with different settings "
                f"({changed}); give --overwrite to replace it, or another --out"
            )

    def _remove_records(self) -> None:
        try:
            for path in self._folder.iterdir():
                if path.name != _LOCK:
                    path.unlink()
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def _release(self) -> None:
        """Release the lock; remove the folder if it is empty."""
        if self._lock is not None:
            remove_lock(self._lock, self._folder / _LOCK)
            self._lock = None
            with suppress(OSError):
                self._folder.rmdir()


def _checksum(content: Mapping[str, Any]) -> str:
    """Return a hash of JSON values, 32 hex digits."""
    text = json.dumps(content, sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def read_identity(path: Path) -> dict[str, Any] | None:
    """Return the identity in a JSON file of a result: empty if it has none, None without a file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["identity"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the differences between two identities for an error; empty if they are equal."""
    return "; ".join(
        f"{printable(key)} was {show(before.get(key))} and is now {show(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


def _read_identity(path: Path) -> dict[str, Any]:
    """Return the identity of unfinished work."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{display_name(path)}: cannot be read ({error}); give --overwrite to start over"
        ) from error


def _make_folders(folder: Path) -> None:
    """Create a folder with its parents, on disk. A symbolic link in its place is an OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "is a symbolic link", str(folder))
    for path in missing:
        flush_folder(path.parent)


def _file_size(path: Path) -> int:
    """Return the size of a regular file, without following links; -1: there is none."""
    try:
        status = path.lstat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"cannot write {display_name(folder)} ({error.strerror}); "
        "check free space and permissions, or give another output folder"
    )
