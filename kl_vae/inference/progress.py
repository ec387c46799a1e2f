"""Numbered units of work, shared by any number of ranks, with a progress bar and resumption.

The result of a unit depends only on the unit, not on the rank or the number of ranks. A command
that is killed and resumed on a different number of ranks therefore gives the same results.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.files import display_name, remove_temporaries, write_text_atomically

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0  # interval of log lines if no progress bar is shown
FOLDER = ".unfinished"
_IDENTITY = "identity.json"


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

    Args:
        out: output folder of the command; rank 0 creates it.
        identity: everything that the results depend on, as plain values; resumed work must have
            the same identity.
        resume: continue unfinished work in `out`.
        ranks: the ranks of the command; all of them must call this.

    Raises:
        ValueError: `out` contains unfinished work and `resume` is false or the identity differs;
            or `out` cannot be written to.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], resume: bool, ranks: Ranks) -> None:
        self._folder = out / FOLDER
        self._ranks = ranks
        ranks.on_rank_zero(lambda: self._begin(identity, resume))

    def share(self, number: int) -> list[int]:
        """Return this rank's share of the unfinished units among 0 to `number` - 1."""
        missing = self._ranks.on_rank_zero(
            lambda: [unit for unit in range(number) if not self._record(unit).exists()]
        )
        return missing[self._ranks.rank :: self._ranks.world_size]

    def write(self, unit: int, record: Any) -> None:
        """Record that a unit is finished; call this after all other files of the unit are written.

        Args:
            unit: number of the unit.
            record: JSON values; numbers must be finite.

        Raises:
            ValueError: the file cannot be written.
        """
        text = json.dumps(record, allow_nan=False)
        try:
            write_text_atomically(self._record(unit), text)
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def find(self, unit: int) -> Any:
        """Return the record of a unit, or None if it is unfinished."""
        path = self._record(unit)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def read(self, number: int) -> Iterator[Any]:
        """Yield the records of the units 0 to `number` - 1, all of which must be finished."""
        for unit in range(number):
            yield json.loads(self._record(unit).read_text(encoding="utf-8"))

    def path(self, unit: int, suffix: str) -> Path:
        """Return the path for non-JSON data of a unit, which is kept until `close`."""
        return self._record(unit).with_suffix(suffix)

    def close(self) -> None:
        """Delete the records; only rank 0 calls this."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _record(self, unit: int) -> Path:
        return self._folder / f"{unit:07d}.json"

    def _begin(self, identity: Mapping[str, Any], resume: bool) -> None:
        identity = json.loads(json.dumps(identity))
        path = self._folder / _IDENTITY
        name = display_name(self._folder)
        if path.exists():
            if not resume:
                raise ValueError(
                    f"{name}: an earlier command did not finish; give --resume to continue it, or "
                    "remove this folder to start over"
                )
            changed = differences(_read_identity(path), identity)
            if changed:
                raise ValueError(
                    f"{name}: unfinished work with different settings ({changed}); use the same "
                    "settings to resume it, or another --out"
                )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self._folder)
            write_text_atomically(path, json.dumps(identity))
        except OSError as error:
            raise _unwritable(self._folder, error) from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the differences between two identities for an error; empty if they are equal."""
    return "; ".join(
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{display_name(path)}: cannot be read ({error}); remove {display_name(path.parent)} "
            "to start over"
        ) from error


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"cannot write {display_name(folder)} ({error.strerror}); "
        "check free space and permissions, or give another output folder"
    )
