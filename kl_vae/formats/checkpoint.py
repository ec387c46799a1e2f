"""Our own checkpoint files, and which of them a run directory holds.

A checkpoint is a dict of tensors and plain values. `FORMAT` stands under "format", the raw weights
under "model", and the resolved config under "config"; training adds what resuming needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kl_vae.formats.weights import read_file

logger = logging.getLogger(__name__)

FORMAT = "kl_vae.checkpoint.1"
FOLDER = "checkpoints"
BEST = "best.json"  # names the checkpoint with the best monitored figure


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` holds either the whole of it or what it held before.

    Written beside, flushed to disk, renamed; on failure the temporary is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for text, as UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / FOLDER / f"step_{step:08d}.pt"


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, then its sha256 beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))
    write_text_atomically(_digest_path(path), f"{_digest(path)}  {path.name}\n")


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint and its sha256."""
    _digest_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours.

    Raises:
        ValueError: it is missing, damaged, or not one of ours.
    """
    digest = _digest_path(path)
    if path.is_file() and digest.is_file() and digest.read_text().split()[:1] != [_digest(path)]:
        raise ValueError(
            f"{path}: does not match its sha256, it is damaged; use another checkpoint"
        )
    content = read_file(path)
    if not is_checkpoint(content):
        raise ValueError(f"{path}: not a checkpoint of kl_vae")
    return dict(content)


def is_checkpoint(content: object) -> bool:
    """Whether a loaded file is one of our checkpoints."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run directory, newest first."""
    return sorted((run / FOLDER).glob("step_*.pt"), reverse=True)


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read, with its content; None: there is none.

    Damaged ones are passed over, each with a warning.
    """
    for path in list_checkpoints(run):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            logger.warning("passing over a checkpoint: %s", error)
    return None


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the best monitored figure; None where a run has named none."""
    try:
        name = json.loads((run / FOLDER / BEST).read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    path = run / FOLDER / Path(str(name)).name
    return path if path.is_file() else None


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
