"""Work in numbered units, done by any number of ranks, shown, and resumed where it was ended.

What a unit gives is a function of the unit alone: not of the rank that does it, of how many ranks
there are, nor of when. So a command that is killed and resumed, on other ranks, ends as if it had
not been.
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

LOG_SECONDS = 30.0  # between log lines where there is no progress bar
FOLDER = ".unfinished"
_IDENTITY = "identity.json"


def units_of(number: int, size: int) -> list[range]:
    """Cut the images 0 to `number` - 1 into units of `size` consecutive ones; the last has fewer.

    Raises:
        ValueError: `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"size={size}: give at least 1 image a unit")
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


@contextmanager
def show_progress(total: int, ranks: Ranks) -> Iterator[Callable[[int], None]]:
    """Show how many of this rank's images are done, on rank 0: a bar, or a log line every 30 s.

    The bar is shown where stderr is a terminal. Yields the function to call with the number of
    images that were done since its last call.
    """
    title = f"rank 0 of {ranks.world_size}" if ranks.world_size > 1 else None
    hidden = None if ranks.is_rank_zero else True  # None: hidden where stderr is no terminal
    bar = tqdm(total=total, unit="image", desc=title, disable=hidden)
    done, said = 0, time.monotonic()

    def update(number: int) -> None:
        nonlocal done, said
        done += number
        bar.update(number)
        if bar.disable and ranks.is_rank_zero and time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            logger.info("%s%d of %d images", f"{title}: " if title else "", done, total)

    with logging_redirect_tqdm(), bar:
        yield update


class Progress:
    """The records of the units that are done, each a file in `OUT/.unfinished` until all are.

    Args:
        out: the output folder of the command; rank 0 creates it.
        identity: all that the results depend on, plain values: what is resumed must have the same.
        resume: continue what is there.
        ranks: all of them call this.

    Raises:
        ValueError: unfinished work is there without `resume`, or is other work; or `out` cannot be
            written to.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], resume: bool, ranks: Ranks) -> None:
        self._folder = out / FOLDER
        self._ranks = ranks
        ranks.on_rank_zero(lambda: self._begin(identity, resume))

    def share(self, number: int) -> list[int]:
        """This rank's part of the units 0 to `number` - 1 that are not done yet."""
        missing = self._ranks.on_rank_zero(
            lambda: [unit for unit in range(number) if not self._record(unit).exists()]
        )
        return missing[self._ranks.rank :: self._ranks.world_size]

    def write(self, unit: int, record: Any) -> None:
        """Record that a unit is done: JSON, whose numbers are finite.

        What else the unit writes (`path`, or outside of here) it has written before.

        Raises:
            ValueError: the file cannot be written.
        """
        text = json.dumps(record, allow_nan=False)
        try:
            write_text_atomically(self._record(unit), text)
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def find(self, unit: int) -> Any:
        """The record of a unit; None: it is not done yet."""
        path = self._record(unit)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def read(self, number: int) -> Iterator[Any]:
        """The records of the units 0 to `number` - 1, which are all done."""
        for unit in range(number):
            yield json.loads(self._record(unit).read_text(encoding="utf-8"))

    def path(self, unit: int, suffix: str) -> Path:
        """Where a unit keeps what is no JSON, until `close`."""
        return self._record(unit).with_suffix(suffix)

    def close(self) -> None:
        """Forget the records: what they were kept for is written. Rank 0 alone calls this."""
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
                    f"{name}: an earlier command was ended before it had done all; give --resume "
                    "to go on, or remove that folder to begin again"
                )
            changed = differences(_read_identity(path), identity)
            if changed:
                raise ValueError(
                    f"{name}: holds other work ({changed}); give the same again to resume it, or "
                    "another --out"
                )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self._folder)
            write_text_atomically(path, json.dumps(identity))
        except OSError as error:
            raise _unwritable(self._folder, error) from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two identities, as an error says it; empty: nothing."""
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
            "to begin again"
        ) from error


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"cannot write {display_name(folder)} ({error.strerror}); "
        "make room and permission for it, or give another output folder"
    )
