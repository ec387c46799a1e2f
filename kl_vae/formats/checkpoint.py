"""Our own checkpoint files, and which of them a run directory holds.

A checkpoint is a dict of tensors and plain values. `FORMAT` stands under "format", the raw weights
under "model", and the resolved config under "config"; training adds what resuming needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kl_vae.files import write_atomically, write_text_atomically
from kl_vae.formats.weights import read_file, state_dict_of

logger = logging.getLogger(__name__)

FORMAT = "kl_vae.checkpoint.1"
FOLDER = "checkpoints"
BEST = "best.json"  # names the checkpoint with the best monitored figure


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / FOLDER / f"step_{step:08d}.pt"


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, then its sha256 beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _digest_path(path).unlink(missing_ok=True)  # that of an earlier file of this name
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
    check_digest(path)
    content = read_file(path)
    if not is_checkpoint(content):
        raise ValueError(f"{path}: not a checkpoint of kl_vae")
    return dict(content)


def check_digest(path: Path) -> None:
    """Raise ValueError where a sha256 lies beside the file and is not that of the file."""
    digest = _digest_path(path)
    if path.is_file() and digest.is_file() and digest.read_bytes()[:64] != _digest(path).encode():
        raise ValueError(
            f"{path}: does not match its sha256, it is damaged; use another checkpoint"
        )


def export_checkpoint(source: Path, out: Path, ema: bool = True) -> str:
    """Write the autoencoder's weights and its config alone.

    Args:
        source: a run directory or one of our checkpoints.
        out: the file to write.
        ema: the moving average of the weights, where there is one.

    Returns:
        What was written, in words.

    Raises:
        ValueError: `source` is no checkpoint of ours, or `out` exists or cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; name a file that does not")
    path = choose_checkpoint(source)
    content = read_file(path)
    params = model_params_of(content, str(path))
    tensors = {
        key: tensor
        for key, tensor in state_dict_of(content, str(path), ema=ema).items()
        if not key.startswith("loss.")
    }
    averaged = ema and content.get("ema") is not None
    # a loss needs no place in a config whose weights have none
    config = {"model": {"params": {**params, "lossconfig": None, "monitor": None}}}
    try:
        write_checkpoint(out, {"model": tensors, "config": config, "step": content["step"]})
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error}); choose another --out") from None
    kind = "averaged weights" if averaged else "weights"
    return f"{kind} of step {content['step']} ({len(tensors)} tensors)"


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


def choose_checkpoint(path: Path) -> Path:
    """The file that a run directory or a file's path means: of a run the best, else the newest.

    Raises:
        ValueError: a directory without checkpoints, or a file that does not match its sha256.
    """
    if path.is_dir():
        chosen = best_checkpoint(path) or next(iter(list_checkpoints(path)), None)
        if chosen is None:
            raise ValueError(f"{path}: no checkpoint in it; give a run directory or a file")
        path = chosen
    check_digest(path)
    return path


def model_params_of(content: object, source: str) -> Mapping[str, Any]:
    """The `model.params` in the config of a loaded checkpoint.

    Raises:
        ValueError: it is not one of ours, or has no such config.
    """
    try:
        params = content["config"]["model"]["params"] if is_checkpoint(content) else None  # type: ignore[index]
    except (KeyError, TypeError):
        params = None
    if not isinstance(params, Mapping):
        raise ValueError(f"{source}: does not say its architecture; give its config as well")
    return params


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
