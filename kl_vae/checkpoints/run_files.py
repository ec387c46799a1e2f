"""A run's own files: the layout of its directory, and its checkpoints.

A checkpoint is a dict of tensors and plain values: "format" is `FORMAT`, "model" the raw weights,
"config" the resolved config, and the other keys are what resuming needs (`TrainingState.content`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from kl_vae.checkpoints.torch_file import read_torch_file
from kl_vae.runtime.files import sha256_of, write_atomically, write_text_atomically

logger = logging.getLogger(__name__)


FORMAT = "kl_vae.checkpoint.1"


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, then its sha256 beside it.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        with ThreadPoolExecutor(1) as thread:
            stream = _Digesting(file, digest, thread)
            try:
                torch.save({"format": FORMAT, **content}, cast(BinaryIO, stream))
            except RuntimeError:  # what torch makes of an OSError
                if stream.error is None:
                    raise
                raise stream.error from None
        file.flush()
        os.fsync(file.fileno())
        # the sha256 of an earlier file of this name; if that is damaged it is removed first, since
        # nothing but its sha256 says so
        try:
            check_digest(path)
        except ValueError:
            path.unlink()
        _digest_path(path).unlink(missing_ok=True)

    write_atomically(path, write)
    _write_digest(path, digest.hexdigest())


def complete_checkpoint(path: Path) -> None:
    """Write the sha256 of a checkpoint that is whole, if the save was cut short before it."""
    if not _digest_path(path).is_file():
        _write_digest(path, sha256_of(path))


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, then its sha256: a damaged one is never left without it."""
    path.unlink(missing_ok=True)
    _digest_path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of ours; with `mmap` leave tensors in the file until they are used.

    Raises:
        ValueError: it is missing, damaged, or not one of ours.
    """
    check_digest(path)
    content = read_torch_file(path, mmap=mmap)
    if not is_checkpoint(content):
        raise ValueError(f"{path}: not a checkpoint of kl_vae")
    return dict(content)


def check_digest(path: Path) -> None:
    """Raise ValueError if the file does not match the sha256 beside it, if there is one."""
    digest = _digest_path(path)
    try:
        known = digest.read_bytes()[:64] if path.is_file() and digest.is_file() else None
        damaged = known is not None and known != sha256_of(path).encode()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); fix that") from None
    if damaged:
        raise ValueError(
            f"{path}: does not match its sha256, it is damaged; use another checkpoint"
        )


def is_checkpoint(content: object) -> bool:
    """Return whether a loaded file is one of our checkpoints."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


class _Digesting:
    """A file that a thread hashes while it is written; `error` is why a write failed."""

    def __init__(self, file: BinaryIO, digest: hashlib._Hash, thread: ThreadPoolExecutor) -> None:
        self._file = file
        self._digest = digest
        self._thread = thread
        self.error: OSError | None = None

    def write(self, block: bytes) -> int:
        large = len(block) > 1 << 16  # else the thread costs more than it saves
        digesting = self._thread.submit(self._digest.update, block) if large else None
        try:
            return self._file.write(block)
        except OSError as error:
            self.error = error
            raise
        finally:
            if digesting is None:
                self._digest.update(block)
            else:
                digesting.result()

    def flush(self) -> None:
        self._file.flush()


def _write_digest(path: Path, digest: str) -> None:
    write_text_atomically(_digest_path(path), f"{digest}  {path.name}\n")


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


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
