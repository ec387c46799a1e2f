"""The layout of a run directory, and how to read it.

runs/NAME/  config.yaml  metrics.jsonl  status.json  bad_images.txt  .lock  samples/  tensorboard/
            checkpoints/step_00001000.pt (+ .sha256)  checkpoints/best.json
"""

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

CONFIG = "config.yaml"
STATUS = "status.json"
METRICS = "metrics.jsonl"
BAD_IMAGES = "bad_images.txt"
LOCK = ".lock"
SAMPLES = "samples"
TENSORBOARD = "tensorboard"
FOLDER = "checkpoints"
BEST = "best.json"  # in FOLDER: names the checkpoint with the best monitored metric

_NAME = re.compile(r"step_(\d+)\.pt")


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return run / FOLDER / f"step_{step:08d}.pt"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run directory, newest first."""
    steps = {path: _NAME.fullmatch(path.name) for path in (run / FOLDER).glob("step_*.pt")}
    return sorted(
        (path for path, name in steps.items() if name),
        key=lambda path: int(path.stem.removeprefix("step_")),
        reverse=True,
    )


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of a run that can be read, with its content; None: none exists.

    Damaged ones are skipped, each with a warning.

    Raises:
        ValueError: there are checkpoints, and none of them can be read.
    """
    paths = list_checkpoints(run)
    return _first_whole(paths, run) if paths else None


def best_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint with the best monitored metric; None if the run has named none."""
    try:
        name = json.loads((run / FOLDER / BEST).read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    path = run / FOLDER / Path(str(name)).name
    return path if path.is_file() else None


def read_status(run: Path) -> dict[str, Any]:
    """Return the content of status.json; empty where it is missing or damaged."""
    try:
        return dict(json.loads((run / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that can be read, each with its `step`."""
    path = run / METRICS
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # cut short when its process was killed
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory, with checkpoints or without."""
    return (folder / FOLDER).is_dir()


def read_chosen(path: Path, *, mmap: bool = False) -> tuple[Path, Any]:
    """Read a checkpoint: of a run directory the best one, else the newest; or a file of torch's.

    Damaged checkpoints of a run are skipped, each with a warning.

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
            logger.warning("skipping a checkpoint: %s", error)
    raise ValueError(
        f"{run}: none of its checkpoints can be read; copy them from a backup, or start in a new "
        "directory"
    )
