"""Which checkpoints a run directory holds, and which of them to read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kl_vae.checkpoints.checkpoint import check_digest, read_checkpoint
from kl_vae.checkpoints.torch_file import read_torch_file

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
BEST = "best.json"  # names the checkpoint with the best monitored figure

_NAME = re.compile(r"step_(\d+)\.pt")


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / FOLDER / f"step_{step:08d}.pt"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run directory, newest first."""
    steps = {path: _NAME.fullmatch(path.name) for path in (run / FOLDER).glob("step_*.pt")}
    return sorted(
        (path for path, name in steps.items() if name),
        key=lambda path: int(path.stem.removeprefix("step_")),
        reverse=True,
    )


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read, with its content; None: there is none.

    Damaged ones are passed over, each with a warning.

    Raises:
        ValueError: there are checkpoints, and none of them can be read.
    """
    paths = list_checkpoints(run)
    return _first_whole(paths, run) if paths else None


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the best monitored figure; None where a run has named none."""
    try:
        name = json.loads((run / FOLDER / BEST).read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    path = run / FOLDER / Path(str(name)).name
    return path if path.is_file() else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, with checkpoints or without."""
    return (folder / FOLDER).is_dir()


def read_chosen(path: Path, *, mmap: bool = False) -> tuple[Path, Any]:
    """Read the file that a path means: of a run directory the best checkpoint, else the newest.

    Of a run damaged checkpoints are passed over, each with a warning; a file may be any of torch's.

    Args:
        path: a run directory or a file.
        mmap: leave tensors in the file until they are used.

    Raises:
        ValueError: a directory without a checkpoint that can be read, or a damaged file.
    """
    if not path.is_dir():
        check_digest(path)
        return path, read_torch_file(path, mmap=mmap)
    best = best_checkpoint(path)
    paths = [
        *([best] if best else []),
        *(other for other in list_checkpoints(path) if other != best),
    ]
    if not paths:
        raise ValueError(f"{path}: no checkpoint in it; give a run directory or a file")
    return _first_whole(paths, path, mmap=mmap)


def _first_whole(
    paths: Iterable[Path], run: Path, *, mmap: bool = False
) -> tuple[Path, dict[str, Any]]:
    for path in paths:
        try:
            return path, read_checkpoint(path, mmap=mmap)
        except ValueError as error:
            logger.warning("passing over a checkpoint: %s", error)
    raise ValueError(
        f"{run}: none of its checkpoints can be read; copy them from a backup, or start in a new "
        "directory"
    )
