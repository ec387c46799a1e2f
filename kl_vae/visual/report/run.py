"""Read the state of a run from its directory; files may be missing or damaged."""

from __future__ import annotations

import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kl_vae.checkpoints.run_files import (
    BAD_IMAGES,
    BEST,
    CONFIG,
    FOLDER,
    LOCK,
    METRICS,
    SAMPLES,
    STATUS,
    list_checkpoints,
)
from kl_vae.runtime.config_file import MAX_BYTES, parse_yaml
from kl_vae.runtime.files import display_name
from kl_vae.runtime.locks import is_locked
from kl_vae.visual.report.metrics import MetricsFile

MAX_BAD_IMAGES = 200  # named on the page

_IMAGE = re.compile(r"(.+)_(\d{8,15})\.png", re.DOTALL)

LOCKLESS_SECONDS = 60.0  # of silence without a lock, after which a run is lost
SILENT_SECONDS = 1800.0  # of silence that is worth a remark


@dataclass
class RunReading:
    """The state of a run at a moment.

    Attributes:
        run: its directory.
        state: running, finished, stopped, failed, lost (killed) or unknown.
        remark: why it ended, or a warning; may be empty.
        step: optimisation steps so far.
        total_steps: of the whole run; None if unknown.
        written: time of its last write, in seconds since 1970.
        speed: recent images per second of training.
        seconds_left: at that speed, without validations; None unless it is running.
        config_text: config.yaml.
        config: the same, parsed; empty where it cannot be.
        best: of best.json: checkpoint, monitor, value, step; may be empty.
        checkpoints: name and bytes, newest first.
        bad_images: path and reason of the first.
        number_bad: of all bad images.
        images: the steps of samples/NAME_STEP.png by name, in order.
        notes: what could not be read.
    """

    run: Path
    state: str = "unknown"
    remark: str = ""
    step: int = 0
    total_steps: int | None = None
    written: float | None = None
    speed: float | None = None
    seconds_left: float | None = None
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[tuple[str, int]] = field(default_factory=list)
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    number_bad: int = 0
    images: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def progress(self) -> str:
        """Such as "step 1200 of 2000"."""
        return f"step {self.step}" + (f" of {self.total_steps}" if self.total_steps else "")

    def setting(self, *keys: str) -> Any:
        """Return the config's value at a path of keys; None where it has none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def pixels(self) -> int | None:
        """Number of pixels of a training crop; None if the config does not say."""
        crop = self.setting("data", "crop")
        side = crop or self.setting("model", "params", "ddconfig", "resolution")
        return side * side if type(side) is int and side > 0 else None


def check_run_directory(run: Path) -> None:
    """Check that there is a run to report on.

    Raises:
        ValueError: there is none; the text says what is missing.
    """
    name = display_name(run)
    if not os.path.isdir(run):
        kind = "a file" if os.path.exists(run) else "no such directory"
        raise ValueError(
            f"{name}: {kind}; give the directory of a run, such as runs/NAME, which is what "
            "`kl-vae train` wrote to"
        )
    if not any(os.path.isfile(run / file) for file in (CONFIG, METRICS, STATUS)):
        raise ValueError(
            f"{name}: is no run directory: it has no {CONFIG}, no {METRICS} and no {STATUS}; give "
            "the directory of a run, such as runs/NAME"
        )


def read_run(run: Path, metrics: MetricsFile) -> RunReading:
    """Read the present state of a run; `metrics` has been read just before."""
    reading = RunReading(run, speed=metrics.recent_speed)
    _read_config(reading)
    _read_status(reading, metrics)
    _read_checkpoints(reading)
    _read_bad_images(reading)
    _list_images(reading)
    if metrics.unreadable:
        reading.notes.append(f"{METRICS}: {metrics.unreadable} lines cannot be read")
    if metrics.left_out:
        reading.notes.append(f"{METRICS}: {metrics.left_out} metrics are left out, of too many")
    return reading


def _read_text(reading: RunReading, name: str) -> str:
    """Return the first MAX_BYTES bytes of a file of the run; empty, with a note, if unreadable."""
    try:
        with open(reading.run / name, "rb") as file:
            return file.read(MAX_BYTES).decode(errors="replace")
    except OSError as error:
        reading.notes.append(f"{name}: {error.strerror}")
        return ""


def _read_config(reading: RunReading) -> None:
    text = reading.config_text = _read_text(reading, CONFIG)
    try:
        content = parse_yaml(text, CONFIG)
    except ValueError as error:
        reading.notes.append(str(error))
        return
    if isinstance(content, dict):
        reading.config = content


def _read_status(reading: RunReading, metrics: MetricsFile) -> None:
    status: dict[str, Any] = {}
    try:
        status = dict(json.loads(_read_text(reading, STATUS) or "{}"))
    except (ValueError, TypeError, RecursionError):
        reading.notes.append(f"{STATUS}: damaged")
    state, step, total = (status.get(key) for key in ("state", "step", "total_steps"))
    if state in ("running", "finished", "stopped", "failed"):
        reading.state = state
    reading.remark = " ".join(str(status.get("reason") or "").split())
    latest = metrics.latest or 0
    reading.step = step if type(step) is int and step >= 0 else latest
    if reading.state in ("running", "unknown"):
        reading.step = max(reading.step, latest)  # the status is written with checkpoints only
    if type(total) is not int or total < 1:
        total = reading.setting("training", "max_steps")
    reading.total_steps = total if type(total) is int and total > 0 else None
    times = []
    for name in (METRICS, STATUS):
        try:
            times.append((reading.run / name).stat().st_mtime)
        except OSError:
            continue
    reading.written = max(times, default=None)
    if reading.state != "running":
        return
    locked = True if status.get("pid") == os.getpid() else is_locked(reading.run / LOCK)
    lost, reading.remark = describe_silence(locked, time.time() - (reading.written or 0.0))
    batch = reading.setting("training", "global_batch_size")
    if lost:
        reading.state = "lost"
    elif reading.total_steps and reading.speed and type(batch) is int:
        reading.seconds_left = max(0, reading.total_steps - reading.step) * batch / reading.speed


def _read_checkpoints(reading: RunReading) -> None:
    try:
        paths = list_checkpoints(reading.run)
        reading.checkpoints = [(path.name, path.stat().st_size) for path in paths]
    except OSError:  # removed meanwhile
        reading.checkpoints = []
    path = reading.run / FOLDER / BEST
    try:
        best = dict(json.loads(path.read_text(encoding="utf-8")))
        value, step = float(best["value"]), int(best["step"])
        if math.isfinite(value):
            text = {key: str(best[key]) for key in ("checkpoint", "monitor")}
            reading.best = {**text, "value": value, "step": step}
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        reading.notes.append(f"{FOLDER}/{BEST}: damaged")


def _read_bad_images(reading: RunReading) -> None:
    try:
        with open(reading.run / BAD_IMAGES, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, tab, reason = line.partition("\t")
                if tab and reading.number_bad < MAX_BAD_IMAGES:
                    reading.bad_images.append((name[:1000], reason.strip()[:1000]))
                reading.number_bad += bool(tab)
    except FileNotFoundError:
        return
    except OSError as error:
        reading.notes.append(f"{BAD_IMAGES}: {error.strerror}")


def _list_images(reading: RunReading) -> None:
    try:
        files = os.listdir(reading.run / SAMPLES)
    except OSError:
        return
    images: dict[str, list[tuple[int, str]]] = {}
    for name in files:
        if match := _IMAGE.fullmatch(name):
            images.setdefault(match[1], []).append((int(match[2]), match[2]))
    names = sorted(images, key=lambda name: (name != "reconstructions", name))
    reading.images = {name: [text for _, text in sorted(images[name])] for name in names}


def describe_silence(locked: bool | None, seconds: float) -> tuple[bool, str]:
    """Return whether a run with the status "running" is lost, and a remark, which may be empty.

    Args:
        locked: the result of `is_locked`.
        seconds: time since the run wrote something.
    """
    if locked is False and seconds > LOCKLESS_SECONDS:
        return True, (
            f"nothing written for {duration(seconds)}, and no process holds its lock: killed, or "
            "its machine was lost (or it is on a machine whose locks are not seen from here)"
        )
    if locked is None and seconds > SILENT_SECONDS:
        return True, (
            f"nothing written for {duration(seconds)}: killed, or its machine was lost; whether a "
            "process holds its lock cannot be told here"
        )
    if locked and seconds > SILENT_SECONDS:
        return False, (
            f"its process is there, but nothing was written for {duration(seconds)}: a long "
            "validation, or it hangs"
        )
    return False, ""


def duration(seconds: float) -> str:
    """Return a text such as "42 s", "3 min 05 s", "2 h 10 min" or "3 d 4 h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
