"""Write a run's directory: lock, config, status and checkpoints.

`kl_vae.checkpoints.run_files` defines its layout and reads it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from kl_vae.checkpoints.run_files import (
    BEST,
    CONFIG,
    FOLDER,
    LOCK,
    SAMPLES,
    STATUS,
    best_checkpoint,
    checkpoint_path,
    complete_checkpoint,
    list_checkpoints,
    read_status,
    remove_checkpoint,
    write_checkpoint,
)
from kl_vae.runtime.config_file import dump_config, parse_file, parse_yaml
from kl_vae.runtime.errors import RunError
from kl_vae.runtime.files import remove_temporaries, write_text_atomically
from kl_vae.training.state import TrainingState

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3  # in a row

# keys that may change when a run is resumed: they do not change what a step computes (a fingerprint
# compares the images, the batch size accumulation)
HARMLESS = (
    "data.train.root",
    "data.validation.root",
    "data.num_workers",
    "data.max_bad_fraction",
    "training.accumulate_batches",
    "training.activation_checkpointing",
    "training.epochs",
    "training.max_steps",
    "training.validate_every_steps",
    "training.save_every_steps",
    "training.keep_checkpoints",
    "training.log_every_steps",
    "training.sample_images",
    "training.max_skipped_steps",
    "training.check_ranks_every_steps",
    "training.timeout_seconds",
)


class RunDirectory:
    """A run's directory, which one process at a time writes: rank 0 of a run.

    As a context manager it releases the lock.

    Args:
        path: the directory; it is created by `lock`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None  # a file descriptor
        self._failed_saves = 0  # in a row
        self._whole: list[Path] = []  # checkpoints known to be intact, newest first

    def check(self, config: dict[str, Any]) -> bool:
        """Return whether it holds a run of this config to resume, without writing.

        Harmless changes of the config are logged.

        Raises:
            ValueError: it is a file, holds the run of another config, or something else.
        """
        run = self.path
        if not run.exists():
            return False
        if not run.is_dir():
            raise ValueError(f"{run}: is a file; choose another --run-dir")
        if not (run / CONFIG).is_file():
            if any(not path.name.startswith(".") for path in run.iterdir()):
                raise ValueError(f"{run}: not empty and not a run; choose another --run-dir")
            return False
        written = parse_file(run / CONFIG)
        if "data" in written:
            written["data"].setdefault("range", "auto")  # not in version 0.1
        before = _flatten(written)
        before.pop("data.listing_cache", None)  # of version 0.1, without effect on the data
        now = _flatten(parse_yaml(dump_config(config), "this config"))
        changed = {
            key: f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        }
        harmful = [text for key, text in changed.items() if key not in HARMLESS]
        if harmful:
            raise ValueError(
                f"{run}: made with another config ({'; '.join(harmful)}); choose another "
                "--run-dir, or give the same config to resume"
            )
        for text in changed.values():
            logger.info("resuming: %s", text)
        return True

    def pixel_range(self) -> Any:
        """Return `data.range` of the run to resume; None: there is none."""
        if not (self.path / CONFIG).is_file():
            return None
        return parse_file(self.path / CONFIG).get("data", {}).get("range")

    def lock(self) -> None:
        """Create the directory and lock it, if its file system can.

        Raises:
            ValueError: another process holds the lock, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error) from None
        if fcntl is None:
            return
        try:
            # of the process, not of the file: the data workers do not inherit it
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # this file system has no locks
            raise ValueError(
                f"{self.path}: another process is training in it; wait until it ends, or choose "
                "another --run-dir"
            ) from None

    def prepare(self, config: dict[str, Any], resumed: Path | None, state: TrainingState) -> None:
        """Write the config, log how the previous process ended, complete an interrupted save.

        Args:
            config: of the run, resolved.
            resumed: the checkpoint that `state` was restored from.
            state: names the best checkpoint.

        Raises:
            ValueError: the directory cannot be written.
        """
        try:
            for folder in (self.path, self.path / SAMPLES, self.path / FOLDER):
                remove_temporaries(folder)
            write_text_atomically(self.path / CONFIG, dump_config(config))
            (self.path / SAMPLES).mkdir(exist_ok=True)
            if resumed is not None:
                complete_checkpoint(resumed)
                self._whole = [resumed]  # the others have not been checked
        except OSError as error:
            raise self._unwritable(error) from None
        self.write_best(state)
        status = read_status(self.path)
        if status.get("state") == "running":
            logger.warning(
                "the previous process of this run ended without a message after step %s (%s): "
                "killed, or its machine was lost",
                status.get("step"),
                status.get("time"),
            )
        elif status.get("state") == "failed":
            logger.warning("the previous process of this run failed: %s", status.get("reason"))

    def save(self, state: TrainingState, keep: int, *, final: bool = False) -> None:
        """Write the checkpoint of this step, then remove old ones.

        A save that fails is logged, and the run continues.

        Args:
            state: what is saved.
            keep: number of newest checkpoints to keep, besides the best.
            final: whether this is the last save, so that a failure is an error.

        Raises:
            RunError: a parameter is not finite, or saving keeps failing.
        """
        path = checkpoint_path(self.path, state.step)
        last = f"the last checkpoint is {self._whole[0]}" if self._whole else "nothing is saved yet"
        name = state.not_finite()
        if name is not None:
            raise RunError(
                f"step {state.step}: {name} is not finite, so the step was not saved: lower the "
                f"learning rates; {last}"
            )
        try:
            write_checkpoint(path, state.content())
            self._whole = [path, *(other for other in self._whole if other != path)]
            self._failed_saves = 0
            self._prune(state, keep)
        except OSError as error:
            self._failed_saves += 1
            text = f"{path} cannot be written ({error.strerror or error})"
            if final or self._failed_saves == MAX_FAILED_SAVES:
                raise RunError(
                    f"{text}: make room or fix the disk, and run the same command again; {last}"
                ) from error
            logger.error(
                "%s, failure %d of %d in a row; the run continues, and %s",
                text,
                self._failed_saves,
                MAX_FAILED_SAVES,
                last,
            )

    def write_best(self, state: TrainingState, keep: int | None = None) -> None:
        """Write which checkpoint is the best; then remove those that are not kept, if `keep`."""
        if not state.best:
            return
        best = {"checkpoint": checkpoint_path(self.path, state.best["step"]).name, **state.best}
        path = self.path / FOLDER / BEST
        try:
            write_text_atomically(path, json.dumps(best, indent=2) + "\n")
            if keep is not None:
                self._prune(state, keep)
        except OSError as error:  # the next validation writes it again
            logger.warning("%s cannot be written (%s)", path, error.strerror)

    def write_status(
        self, status: str, step: int, total_steps: int, reason: str | None = None
    ) -> None:
        """Write the state of the run: running, finished, stopped (by a signal) or failed (why).

        A failure to write is logged.
        """
        content = {
            "state": status,
            "step": step,
            "total_steps": total_steps,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "pid": os.getpid(),
        }
        path = self.path / STATUS
        try:
            write_text_atomically(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s)", path, error.strerror)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _prune(self, state: TrainingState, keep: int) -> None:
        """Remove checkpoints other than the best and the newest, once enough are intact."""
        if len(self._whole) < keep:
            return
        self._whole = self._whole[:keep]
        kept = {*self._whole, best_checkpoint(self.path)}
        if state.best:
            kept.add(checkpoint_path(self.path, state.best["step"]))
        for path in list_checkpoints(self.path):
            if path not in kept:
                remove_checkpoint(path)

    def _unwritable(self, error: OSError) -> ValueError:
        reason = error.strerror or str(error)
        return ValueError(f"{self.path}: cannot be written ({reason}); choose another --run-dir")


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted key paths."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{path}.{key}" if path else str(key))
    return flat
