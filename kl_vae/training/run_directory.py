"""A run's directory: made once, resumed only by the same config."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from kl_vae.checkpoints.run_directory import FOLDER
from kl_vae.runtime.config_file import dump_config, parse_file, parse_yaml
from kl_vae.runtime.files import remove_temporaries, write_text_atomically

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
STATUS = "status.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples"

# what may change between the parts of one run: it does not change what a step computes (of the
# images the fingerprint says that, of accumulation the batch size)
HARMLESS = (
    "data.train.root",
    "data.validation.root",
    "data.num_workers",
    "data.max_bad_fraction",
    "data.listing_cache",
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


def check_run(run: Path, config: dict[str, Any]) -> bool:
    """Whether `run` holds a run to resume, made with this config; writes nothing.

    What has changed harmlessly is named in the log.

    Raises:
        ValueError: it is a file, another config's run, or holds something else.
    """
    if not run.exists():
        return False
    if not run.is_dir():
        raise ValueError(f"{run}: is a file; choose another --run-dir")
    if not (run / CONFIG).is_file():
        if any(not path.name.startswith(".") for path in run.iterdir()):
            raise ValueError(f"{run}: not empty, and holds no run; choose another --run-dir")
        return False
    before = _flatten(parse_file(run / CONFIG))
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


def prepare_run(run: Path, config: dict[str, Any]) -> None:
    """Make the directory and write the resolved config into it; the lock is held.

    What saves that were cut short have left is removed.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        for folder in (run, run / SAMPLES, run / FOLDER):
            remove_temporaries(folder)
        write_text_atomically(run / CONFIG, dump_config(config))
        (run / SAMPLES).mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(run, error) from None


def say_how_it_ended(run: Path) -> None:
    """Log how the last part of a run ended, where it did not end as it should."""
    status: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        status = dict(json.loads((run / STATUS).read_text()))
    if status.get("state") == "running":
        logger.warning(
            "the last part of this run ended without a word after step %s (%s): killed, or its "
            "machine was lost",
            *(status.get("step"), status.get("time")),
        )
    elif status.get("state") == "failed":
        logger.warning("the last part of this run failed: %s", status.get("reason"))


def write_status(
    run: Path, state: str, step: int, total_steps: int, reason: str | None = None
) -> None:
    """Say what the run is doing: running, finished, stopped (by a signal) or failed (why).

    Where that cannot be written the log says so.
    """
    status = {
        "state": state,
        "step": step,
        "total_steps": total_steps,
        "reason": reason,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pid": os.getpid(),
    }
    try:
        write_text_atomically(run / STATUS, json.dumps(status, indent=2) + "\n")
    except OSError as error:
        logger.warning("%s cannot be written (%s)", run / STATUS, error.strerror)


def unwritable(run: Path, error: OSError) -> ValueError:
    """What is said of a run's directory that cannot be written."""
    reason = error.strerror or str(error)
    return ValueError(f"{run}: cannot be written ({reason}); choose another --run-dir")


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{path}.{key}" if path else str(key))
    return flat
