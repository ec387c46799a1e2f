"""What a run's directory says beside its metrics, whatever of it is missing or damaged."""

from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import yaml

from kl_vae.checkpoints.run_directory import (
    BAD_IMAGES,
    BEST,
    CONFIG,
    FOLDER,
    METRICS,
    SAMPLES,
    STATUS,
    list_checkpoints,
)
from kl_vae.runtime.files import display_name
from kl_vae.visual.report.liveness import describe_silence, is_locked
from kl_vae.visual.report.metrics_file import MetricsFile
from kl_vae.visual.report.run_reading import RunReading

MAX_BAD_IMAGES = 200  # named on the page
MAX_TEXT = 1 << 20  # bytes of a config or a status

_PICTURE = re.compile(r"(.+)_(\d{8,15})\.png", re.DOTALL)


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
    """Read what is there now; `metrics` has been read just before."""
    reading = RunReading(run, speed=metrics.recent_speed)
    _read_config(reading)
    _read_status(reading, metrics)
    _read_checkpoints(reading)
    _read_bad_images(reading)
    _list_pictures(reading)
    if metrics.unreadable:
        reading.notes.append(f"{METRICS}: {metrics.unreadable} lines cannot be read")
    if metrics.left_out:
        reading.notes.append(f"{METRICS}: {metrics.left_out} figures are left out, of too many")
    return reading


def _read_text(reading: RunReading, name: str) -> str:
    """The first MAX_TEXT bytes of a file of the run; empty with a note where there is none."""
    try:
        with open(reading.run / name, "rb") as file:
            return file.read(MAX_TEXT).decode(errors="replace")
    except OSError as error:
        reading.notes.append(f"{name}: {error.strerror}")
        return ""


def _read_config(reading: RunReading) -> None:
    text = reading.config_text = _read_text(reading, CONFIG)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reading.notes.append(f"{CONFIG}: not YAML ({str(error).splitlines()[0]})")
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
    locked = True if status.get("pid") == os.getpid() else is_locked(reading.run)
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


def _list_pictures(reading: RunReading) -> None:
    try:
        files = os.listdir(reading.run / SAMPLES)
    except OSError:
        return
    pictures: dict[str, list[tuple[int, str]]] = {}
    for name in files:
        if match := _PICTURE.fullmatch(name):
            pictures.setdefault(match[1], []).append((int(match[2]), match[2]))
    names = sorted(pictures, key=lambda name: (name != "reconstructions", name))
    reading.pictures = {name: [text for _, text in sorted(pictures[name])] for name in names}
