"""The pictures of a run as its page names them: beside it, or in it."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kl_vae.checkpoints.run_directory import SAMPLES
from kl_vae.visual.report.run_reading import RunReading

MAX_STEPS = 1000  # of a name
MAX_EMBEDDED_BYTES = 64 << 20


def linked_pictures(reading: RunReading, folder: Path) -> list[dict[str, Any]]:
    """The pictures by name, with the address that a page in `folder` finds them at."""
    samples = (reading.run / SAMPLES).absolute()
    try:
        base = quote(Path(os.path.relpath(samples, folder.absolute())).as_posix())
    except ValueError:  # on another drive
        base = samples.as_uri()
    return [
        {"name": name, "steps": _evenly(steps, MAX_STEPS), "base": f"{base}/{quote(name)}_"}
        for name, steps in reading.pictures.items()
    ]


def embedded_pictures(
    reading: RunReading, max_bytes: int = MAX_EMBEDDED_BYTES
) -> tuple[list[dict[str, Any]], int]:
    """The pictures by name with their content, and how many there was no room for.

    Where all of them are more than `max_bytes` evenly spaced steps are taken, with the last.
    """
    pictures, left_out = [], 0
    for name, steps in reading.pictures.items():
        paths = {text: reading.run / SAMPLES / f"{name}_{text}.png" for text in steps}
        sizes = {text: _size(path) for text, path in paths.items()}
        room, chosen = max_bytes // len(reading.pictures), steps
        while len(chosen) > 1 and sum(sizes[text] for text in chosen) > room:
            chosen = _evenly(steps, len(chosen) * 3 // 4)
        left_out += len(steps) - len(chosen)
        content = {text: _data_uri(paths[text]) for text in chosen}
        found = {text: uri for text, uri in content.items() if uri}
        pictures.append({"name": name, "steps": list(found), "content": list(found.values())})
    return pictures, left_out


def _evenly(items: list[str], number: int) -> list[str]:
    """So many of them, the first and the last among them; of one the last."""
    if len(items) <= number:
        return items
    if number == 1:
        return items[-1:]
    return [items[i * (len(items) - 1) // (number - 1)] for i in range(number)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _data_uri(path: Path) -> str:
    """Empty where the file cannot be read."""
    try:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return ""
