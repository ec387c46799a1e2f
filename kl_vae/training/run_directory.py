"""Write a run's directory: lock, config, status and checkpoints.

`kl_vae.checkpoints.run_files` defines its layout and reads it.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from kl_vae.checkpoints.run_files import (
    BEST,
    CONFIG,
    FOLDER,
    HISTORY,
    LOCK,
    SAMPLES,
    STATUS,
    best_checkpoint,
    checkpoint_path,
    complete_checkpoint,
    is_intact,
    list_checkpoints,
    read_status,
    remove_checkpoint,
    remove_orphans,
    write_checkpoint,
)
from kl_vae.runtime.config_file import dump_config, parse_file, parse_yaml
from kl_vae.runtime.errors import RunError
from kl_vae.runtime.files import remove_temporaries, write_text_atomically
from kl_vae.runtime.locks import lock_file
from kl_vae.runtime.schema import printable, show
from kl_vae.training.state import TrainingState

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
# beginnings of keys that change results, and may be changed by `kl-vae train RUN KEY=VALUE`
CHANGEABLE = (
    *(
        f"{section}.{key}"
        for section in ("optimizer", "discriminator_optimizer")
        for key in ("learning_rate", "adamw_learning_rate", "betas", "eps", "weight_decay")
        + ("warmup_steps", "schedule", "min_learning_rate", "clip_grad_norm")
    ),
    "model.params.lossconfig.params.disc_weight",
    "model.params.lossconfig.params.kl_weight",
    "training.channels_last",
    "training.compile",
    "training.deterministic",
    "training.ema_decay",
    "training.equivariance",
    "training.freeze",
    "training.precision",
    "training.winograd",
)


class RunDirectory:
    """A run's directory, which one process at a time writes: rank 0 of a run.

    As a context manager it releases the lock.

    Args:
        path: the directory; it is created by `lock`.
        on_purpose: whether changes of its config were given as `kl-vae train RUN KEY=VALUE`.
    """

    def __init__(self, path: Path, on_purpose: bool = False) -> None:
        self.path = path
        self._on_purpose = on_purpose
        self._lock: int | None = None  # a file descriptor
        self._failed_saves = 0  # in a row
        self._whole: list[Path] = []  # checkpoints known to be intact, newest first

    def check(self, config: dict[str, Any]) -> dict[str, Any]:
        """Compare the resolved config with that of the run to resume, without writing.

        Returns:
            The changed keys, and pairs of the value before and now; empty if there is no run.

        Raises:
            ValueError: it is a file, holds the run of another config, or something else.
        """
        run = self.path
        if not run.exists():
            return {}
        if not run.is_dir():
            raise ValueError(f"{run}: is a file; choose another --run-dir")
        if not (run / CONFIG).is_file():
            if any(not path.name.startswith(".") for path in run.iterdir()):
                raise ValueError(f"{run}: not empty and not a run; choose another --run-dir")
            return {}
        before = flatten(self._written_config())
        before.pop("data.listing_cache", None)  # of version 0.1, without effect on the data
        now = flatten(parse_yaml(dump_config(config), "this config"))
        changed = {
            key: (before.get(key), now.get(key))
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        }
        self._check_changes(changed)
        for key, values in changed.items():
            logger.info("resuming: %s", _change(key, values))
        return changed

    def _check_changes(self, changed: dict[str, Any]) -> None:
        """Raise ValueError, with the command that does it, for changes that are not allowed."""
        run = self.path
        changed = {key: values for key, values in changed.items() if key not in HARMLESS}
        if not all(key.startswith(CHANGEABLE) for key in changed):
            raise ValueError(
                f"{run}: made with another config "
                f"({'; '.join(map(_change, changed, changed.values()))}); to start a new run "
                f"from its weights: kl-vae train CONFIG --run-dir NEW model.params.ckpt_path={run}"
            )
        if changed and not self._on_purpose:
            overrides = " ".join(_override(key, now) for key, (_, now) in changed.items())
            raise ValueError(
                f"{run}: made with another config "
                f"({'; '.join(map(_change, changed, changed.values()))}); to continue it with "
                f"these changes: kl-vae train {run} {overrides}"
            )

    def pixel_range(self) -> Any:
        """Return `data.range` of the run to resume; None: there is none."""
        if not (self.path / CONFIG).is_file():
            return None
        return self._written_config().get("data", {}).get("range")

    def _written_config(self) -> dict[str, Any]:
        """Return the config of the run to resume.

        Raises:
            ValueError: config.yaml is damaged.
        """
        path = self.path / CONFIG
        config = parse_file(path)
        if not isinstance(config, dict) or not isinstance(config.get("data", {}), dict):
            raise ValueError(f"{path}: damaged; restore it, or choose another --run-dir")
        if "data" in config:
            config["data"].setdefault("range", "auto")  # not in version 0.1
        return config

    def lock(self) -> None:
        """Create the directory and lock it, if its file system can.

        Raises:
            ValueError: another process holds the lock, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.path / LOCK)
        except BlockingIOError:
            raise ValueError(
                f"{self.path}: another process is training in it; wait until it ends, or choose "
                "another --run-dir"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from None

    def check_owner(self) -> None:
        """Check that the directory is still the one that was locked.

        Raises:
            RunError: it was removed, or another run has started in its place.
        """
        if self._lock is None:
            return
        try:  # without opening it: closing any descriptor of the file would release the lock
            same = os.path.samestat(os.stat(self.path / LOCK), os.fstat(self._lock))
        except FileNotFoundError:
            same = False
        except OSError:  # a storage outage: the save itself reports it
            return
        if not same:
            raise RunError(
                f"{self.path}: was removed, or is now the directory of another run; nothing more "
                "is written to it"
            )

    def prepare(
        self,
        config: dict[str, Any],
        resumed: Path | None,
        state: TrainingState,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the config, log how the previous process ended, complete an interrupted save.

        history.jsonl gets a line: when and at which step this process started, what its results
        depend on, and how its config differs from the one before.

        Args:
            config: of the run, resolved.
            resumed: the checkpoint that `state` was restored from.
            state: names the best checkpoint.
            changes: as returned by `check`.

        Raises:
            ValueError: the directory cannot be written.
        """
        try:
            for folder in (self.path, self.path / SAMPLES, self.path / FOLDER):
                remove_temporaries(folder)
            remove_orphans(self.path)
            write_text_atomically(self.path / CONFIG, dump_config(config))
            with suppress(FileExistsError):  # a file in its place: each image is a warning
                (self.path / SAMPLES).mkdir(exist_ok=True)
            if resumed is not None:
                complete_checkpoint(resumed)
                self._whole = [resumed]  # the others have not been checked
        except OSError as error:
            raise self._unwritable(error) from None
        self.write_best(state)
        line = {
            "time": _now(),
            "step": state.step,
            "environment": state.environment(),
            "changes": {key: list(values) for key, values in (changes or {}).items()},
        }
        try:
            with open(self.path / HISTORY, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self.path / HISTORY, error.strerror)
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
        self.check_owner()
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
            return
        self.prune(state, keep)

    def write_best(self, state: TrainingState, keep: int | None = None) -> None:
        """Write which checkpoint is the best; then remove those that are not kept, if `keep`."""
        if not state.best:
            return
        self.check_owner()
        best = {"checkpoint": checkpoint_path(self.path, state.best["step"]).name, **state.best}
        path = self.path / FOLDER / BEST
        try:
            write_text_atomically(path, json.dumps(best, indent=2) + "\n")
        except OSError as error:  # the next validation writes it again
            logger.warning("%s cannot be written (%s)", path, error.strerror)
        if keep is not None:
            self.prune(state, keep)

    def write_status(
        self, status: str, step: int, total_steps: int, reason: str | None = None
    ) -> None:
        """Write the state of the run: running, finished, stopped (by a signal) or failed (why).

        A failure to write is logged. Nothing is written to the directory of another run.
        """
        try:
            self.check_owner()
        except RunError:
            return
        content = {
            "state": status,
            "step": step,
            "total_steps": total_steps,
            "reason": reason,
            "time": _now(),
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

    def prune(self, state: TrainingState, keep: int) -> None:
        """Remove checkpoints other than the best and the newest, if `keep` of these are intact.

        One that cannot be removed is a warning.
        """
        for path in list_checkpoints(self.path):
            if len(self._whole) < keep and path not in self._whole and is_intact(path):
                self._whole.append(path)  # of an earlier process
        if len(self._whole) < keep:
            return
        self._whole = self._whole[:keep]
        kept = {*self._whole, best_checkpoint(self.path)}
        if state.best:
            kept.add(checkpoint_path(self.path, state.best["step"]))
        for path in list_checkpoints(self.path):
            if path in kept:
                continue
            try:
                remove_checkpoint(path)
            except OSError as error:
                logger.warning("%s cannot be removed (%s)", path, error.strerror)

    def _unwritable(self, error: OSError) -> ValueError:
        reason = error.strerror or str(error)
        return ValueError(f"{self.path}: cannot be written ({reason}); choose another --run-dir")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _change(key: str, values: tuple[Any, Any]) -> str:
    return printable(f"{key} was {show(values[0])} and is now {show(values[1])}")


def _override(key: str, value: Any) -> str:
    """Return an override as a shell takes it."""
    return shlex.quote(f"{key}={json.dumps(value)}")


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted key paths."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{path}.{key}" if path else str(key))
    return flat
