"""Save the state of a run: when that fails, and what is kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from kl_vae.checkpoints.checkpoint import complete_checkpoint, remove_checkpoint, write_checkpoint
from kl_vae.checkpoints.run_directory import (
    BEST,
    FOLDER,
    best_checkpoint,
    checkpoint_path,
    list_checkpoints,
)
from kl_vae.runtime.errors import RunError
from kl_vae.runtime.files import write_text_atomically
from kl_vae.training.state import TrainingState

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # saves in a row


class Checkpoints:
    """Writes the checkpoints of a run, on rank 0 alone.

    Args:
        run: the run's directory.
        state: that is saved.
        keep: how many of the newest are kept, besides the best.
        resumed: the checkpoint that `state` was read from.
    """

    def __init__(self, run: Path, state: TrainingState, keep: int, resumed: Path | None) -> None:
        self._run = run
        self._state = state
        self._keep = keep
        self._failures = 0
        # of the others nobody has checked that they are whole
        self._whole = [] if resumed is None else [resumed]

    def complete(self) -> None:
        """Do what the save of the checkpoint that was resumed has left undone, if it was cut short.

        Raises:
            OSError: that cannot be written.
        """
        for path in self._whole:
            complete_checkpoint(path)
        self._write_best()

    def save(self, *, final: bool = False) -> None:
        """Write the checkpoint of this step, then remove those that are not kept.

        A save that fails is logged, and the run goes on without it.

        Args:
            final: there is no later one, so that its failure is an error.

        Raises:
            RunError: a parameter is not finite, or saving fails for good.
        """
        step, path = self._state.step, checkpoint_path(self._run, self._state.step)
        name = self._state.not_finite()
        if name is not None:
            raise RunError(
                f"step {step}: {name} is not finite, and nothing is saved of it: lower the "
                f"learning rates; {self._last()}"
            )
        try:
            write_checkpoint(path, self._state.content())
            self._whole = [path, *(other for other in self._whole if other != path)]
            self._failures = 0
            self._write_best()
            self._prune()
        except OSError as error:
            self._failures += 1
            text = f"{path} cannot be written ({error.strerror or error})"
            if final or self._failures == MAX_FAILURES:
                raise RunError(
                    f"{text}: make room or mend the disk, and give the same command again; "
                    f"{self._last()}"
                ) from error
            logger.error(
                "%s, failure %d of %d in a row; the run goes on, and %s",
                *(text, self._failures, MAX_FAILURES, self._last()),
            )

    def _last(self) -> str:
        return f"the last checkpoint is {self._whole[0]}" if self._whole else "nothing is saved yet"

    def _write_best(self) -> None:
        best = self._state.best
        if best:
            best = {"checkpoint": checkpoint_path(self._run, best["step"]).name, **best}
            write_text_atomically(self._run / FOLDER / BEST, json.dumps(best, indent=2) + "\n")

    def _prune(self) -> None:
        """Remove what is neither best nor one of the newest, once enough of these are whole."""
        if len(self._whole) < self._keep:
            return
        self._whole = self._whole[: self._keep]
        kept = {*self._whole, best_checkpoint(self._run)}
        for path in list_checkpoints(self._run):
            if path not in kept:
                remove_checkpoint(path)
