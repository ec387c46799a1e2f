"""A run's directory: made once, resumed only by the same config."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from kl_vae.config import dump_config, parse_yaml
from kl_vae.files import write_text_atomically

CONFIG = "config.yaml"
STATUS = "status.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples"

# what may change between the parts of one run: it does not change what a step computes
HARMLESS = (
    "data.num_workers",
    "training.epochs",
    "training.max_steps",
    "training.validate_every_steps",
    "training.save_every_steps",
    "training.keep_checkpoints",
    "training.log_every_steps",
    "training.sample_images",
)


def check_run(run: Path, config: dict[str, Any]) -> bool:
    """Whether `run` holds a run to resume, made with this config; writes nothing.

    Raises:
        ValueError: it is a file, another config's run, or holds something else.
    """
    if not run.exists():
        return False
    if not run.is_dir():
        raise ValueError(f"{run}: is a file; choose another --run-dir")
    if not (run / CONFIG).is_file():
        if any(run.iterdir()):
            raise ValueError(f"{run}: not empty, and holds no run; choose another --run-dir")
        return False
    before = _flatten(parse_yaml((run / CONFIG).read_text(), str(run / CONFIG)))
    now = _flatten(parse_yaml(dump_config(config), "this config"))
    changed = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in HARMLESS
    ]
    if changed:
        raise ValueError(
            f"{run}: made with another config ({'; '.join(changed)}); choose another "
            "--run-dir, or give the same config to resume"
        )
    return True


def prepare_run(run: Path, config: dict[str, Any]) -> None:
    """Make the directory and write the resolved config into it.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / SAMPLES).mkdir(exist_ok=True)
        write_text_atomically(run / CONFIG, dump_config(config))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{run}: cannot be written ({reason}); choose another --run-dir") from None


def write_status(
    run: Path, state: str, step: int, total_steps: int, reason: str | None = None
) -> None:
    """Say what the run is doing: running, finished, stopped (by a signal) or failed (why)."""
    status = {
        "state": state,
        "step": step,
        "total_steps": total_steps,
        "reason": reason,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pid": os.getpid(),
    }
    write_text_atomically(run / STATUS, json.dumps(status, indent=2) + "\n")


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{path}.{key}" if path else str(key))
    return flat
