"""Files of a run: the layout of its directory, and its checkpoints.

A checkpoint is a dict of tensors and plain values. "format" is `FORMAT`, "model" contains the raw
weights and "config" the resolved config. The other keys are needed to resume
(`TrainingState.content`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from kl_vae.checkpoints.torch_file import read_torch_file
from kl_vae.runtime.files import sha256_of, write_atomically, write_text_atomically

logger = logging.getLogger(__name__)


FORMAT = "kl_vae.checkpoint.1"


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, and its SHA-256 to `NAME.sha256`.

    Raises:
        OSError: The file cannot be written; an existing file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    digest = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        with ThreadPoolExecutor(1) as thread:
            stream = _HashingFile(file, digest, thread)
            try:
                torch.save(_unshared({"format": FORMAT, **content}), cast(BinaryIO, stream))
            except RuntimeError:  # torch replaces an OSError by a RuntimeError
                if stream.error is None:
                    raise
                raise stream.error from None
        file.flush()
        os.fsync(file.fileno())
        if is_new:
            _write_digest(path, digest.hexdigest())  # a file without it would be unfinished
            return
        # remove the old SHA-256; remove a damaged old file first, because without its SHA-256 the
        # damage would not be detected
        try:
            check_digest(path)
        except ValueError:
            path.unlink()
        _digest_path(path).unlink(missing_ok=True)

    write_atomically(path, write)
    if not is_new:
        _write_digest(path, digest.hexdigest())


def complete_checkpoint(path: Path) -> None:
    """Write the SHA-256 of a complete checkpoint if the save was interrupted before writing it."""
    if not _digest_path(path).is_file():
        _write_digest(path, sha256_of(path))


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, then its SHA-256, so that a damaged file keeps its SHA-256."""
    path.unlink(missing_ok=True)
    _digest_path(path).unlink(missing_ok=True)


def remove_orphans(run: Path) -> None:
    """Remove the SHA-256 files whose checkpoint is removed already."""
    for digest in (run / FOLDER).glob("step_*.pt.sha256"):
        if not digest.with_suffix("").exists():
            digest.unlink(missing_ok=True)


def is_intact(path: Path) -> bool:
    """Return whether a checkpoint has a SHA-256 that it matches."""
    try:
        check_digest(path)
    except ValueError:
        return False
    return _digest_path(path).is_file()


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a kl_vae checkpoint.

    Args:
        path: the file.
        mmap: memory-map the tensors.

    Raises:
        ValueError: The file is missing, damaged, or not a kl_vae checkpoint.
    """
    check_digest(path)
    content = read_torch_file(path, mmap=mmap)
    if not is_checkpoint(content):
        raise ValueError(f"{path}: not a checkpoint of kl_vae; give a file written by kl-vae")
    return dict(content)


def check_digest(path: Path) -> None:
    """Compare a file with its `.sha256` file, if both exist.

    Raises:
        ValueError: They do not match, or one of them cannot be read.
    """
    digest = _digest_path(path)
    try:
        known = digest.read_bytes()[:64] if path.is_file() and digest.is_file() else None
        damaged = known is not None and known != sha256_of(path).encode()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); check its permissions and the disk"
        ) from None
    if damaged:
        raise ValueError(
            f"{path}: does not match its sha256, so it is damaged; use another checkpoint"
        )


def is_checkpoint(content: object) -> bool:
    """Return whether the content of a file is a kl_vae checkpoint."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def _unshared(tree: Any) -> Any:
    """Copy nested containers, so that equal contents are written as equal bytes.

    pickle writes an object once however often it occurs, and which objects are the same one depends
    on whether they have been restored.
    """
    if isinstance(tree, Mapping):
        return {_unshared(key): _unshared(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(_unshared, tree))
    return sys.intern(tree) if type(tree) is str else tree


class _HashingFile:
    """A file wrapper that hashes written data in a thread; `error` is the last write error."""

    def __init__(self, file: BinaryIO, digest: hashlib._Hash, thread: ThreadPoolExecutor) -> None:
        self._file = file
        self._digest = digest
        self._thread = thread
        self.error: OSError | None = None

    def write(self, block: bytes) -> int:
        large = len(block) > 1 << 16  # smaller blocks do not pay for the thread
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
HISTORY = "history.jsonl"  # a line per process: when it started, and what had changed
BAD_IMAGES = "bad_images.txt"
LOCK = ".lock"
SAMPLES = "samples"
TENSORBOARD = "tensorboard"
FOLDER = "checkpoints"
BEST = "best.json"  # in FOLDER; contains the name of the best checkpoint by the monitored metric

_NAME = re.compile(r"step_(\d+)\.pt")


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the checkpoint path for a step."""
    return run / FOLDER / f"step_{step:08d}.pt"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint paths of a run directory, newest first."""
    steps = {path: _NAME.fullmatch(path.name) for path in (run / FOLDER).glob("step_*.pt")}
    return sorted(
        (path for path, name in steps.items() if name),
        key=lambda path: int(path.stem.removeprefix("step_")),
        reverse=True,
    )


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the newest readable checkpoint of a run, or None without any.

    A damaged checkpoint is skipped with a warning.

    Raises:
        ValueError: There are checkpoints, but none can be read.
    """
    paths = list_checkpoints(run)
    return _first_readable(paths, run) if paths else None


def best_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint with the best monitored metric, or None if the run has none."""
    try:
        name = json.loads((run / FOLDER / BEST).read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return next((path for path in list_checkpoints(run) if path.name == name), None)


def read_status(run: Path) -> dict[str, Any]:
    """Return the content of status.json; empty if it is missing or damaged."""
    try:
        return dict(json.loads((run / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the readable lines of metrics.jsonl that have an integer `step`."""
    path = run / METRICS
    lines = []
    content = path.read_bytes() if path.is_file() else b""
    for text in content.decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # truncated when the process was killed
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines


def metric_number(value: Any) -> float | None:
    """Return a metric as a number (in a line text, if not finite); None for other values."""
    if type(value) is float:
        return value
    try:
        return float(value) if type(value) in (int, str) else None
    except (ValueError, OverflowError):
        return None


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory, with or without checkpoints."""
    return (folder / FOLDER).is_dir()


def run_of(path: str | Path) -> Path | None:
    """Return the run directory that is at a path, or whose config.yaml is; None: there is none."""
    path = Path(path)
    folder = path.parent if path.name == CONFIG else path
    return folder if (folder / CONFIG).is_file() and is_run(folder) else None


def read_chosen(path: Path, *, mmap: bool = False) -> tuple[Path, Any]:
    """Read a checkpoint of a run directory or a torch.save file.

    In a run directory, the best checkpoint is read if it is known, otherwise the newest. A damaged
    checkpoint is skipped with a warning.

    Args:
        path: a run directory or a file.
        mmap: memory-map the tensors.

    Returns:
        The path of the file and its content.

    Raises:
        ValueError: The directory has no readable checkpoint, or the file is damaged.
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
        raise ValueError(f"{path}: contains no checkpoint; give a run directory or a file")
    return _first_readable(paths, path, mmap=mmap)


_ADVERSARY = ("loss.discriminator.", "loss.logits_average")


def trained_discriminator(path: Path, chosen: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a newer discriminator if that of a chosen checkpoint is not trained.

    The best checkpoint of a run may be older than the first step of its discriminator. The newest
    checkpoint then has the better one.

    Args:
        path: the run directory, or a file.
        chosen: the checkpoint whose other weights are used, in the run directory.

    Returns:
        Tensors of the loss by their keys, none if those of `chosen` are used; and words for the log
        if the discriminator of `chosen` is not trained.
    """
    content = read_torch_file(chosen, mmap=True)
    if not is_checkpoint(content) or _is_discriminator_trained(content) is not False:
        return {}, ""
    words, newest = f"step {content['step']}, discriminator not trained", None
    if is_run(path):
        _, newest = _first_readable(list_checkpoints(path), path, mmap=True)
    if newest is None or not _is_discriminator_trained(newest):
        return {}, f" ({words})"
    tensors: dict[str, Tensor] = newest["model"]
    tensors = {key: x for key, x in tensors.items() if key.startswith(_ADVERSARY)}
    return tensors, f" ({words}: that of step {newest['step']} is used)"


def _is_discriminator_trained(content: Mapping[str, Any]) -> bool | None:
    """Return whether the optimiser of a discriminator has taken a step; None: there is none."""
    _, *discriminators = content.get("updaters") or [None]
    return bool(discriminators[0]["optimizer"]["state"]) if discriminators else None


def _first_readable(
    paths: Iterable[Path], run: Path, *, mmap: bool = False
) -> tuple[Path, dict[str, Any]]:
    for path in paths:
        try:
            return path, read_checkpoint(path, mmap=mmap)
        except ValueError as error:
            logger.warning("skipping checkpoint: %s", error)
    raise ValueError(
        f"{run}: none of its checkpoints can be read; restore them from a backup, or start a new "
        "run in another directory"
    )
