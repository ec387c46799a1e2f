"""One HTML file on runs, which works offline: its content, and how it is written."""

from __future__ import annotations

import base64
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kl_vae import __version__
from kl_vae.checkpoints.run_files import SAMPLES
from kl_vae.runtime.files import display_name, remove_temporaries
from kl_vae.runtime.outputs import replace_file
from kl_vae.visual.report.comparison import (
    best_metrics,
    config_differences,
    last_metrics,
    run_names,
    states,
)
from kl_vae.visual.report.metrics import MetricsFile, Series
from kl_vae.visual.report.panels import BITS, Panel, in_order, panels_of, split_of
from kl_vae.visual.report.run import RunReading
from kl_vae.visual.web_page import render_page

REPORT = "report.html"
SCRIPTS = (
    "numbers.js",
    "view.js",
    "frame.js",
    "curve.js",
    "plot.js",
    "heat_map.js",
    "facts.js",
    "samples.js",
    "page.js",
)
MAX_NUMBERS = 150_000  # of all scalars together, about 8 bytes each
MAX_STEPS = 1000  # of a name
MAX_EMBEDDED_BYTES = 64 << 20


def check_output(path: Path) -> None:
    """Check that a page can go to `path` without harm to another file.

    Raises:
        ValueError: its name is not a page's, or it is a folder.
    """
    name = display_name(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {name}: give a file name that ends in .html")
    if os.path.isdir(path):
        raise ValueError(f"--out {name}: is a folder; give a file name in it, such as {REPORT}")


def write_page(
    path: Path,
    runs: Sequence[tuple[RunReading, MetricsFile]],
    embed: bool = False,
    max_bytes: int = MAX_EMBEDDED_BYTES,
) -> None:
    """Write the page of a run, or one that compares several, whole or not at all.

    Args:
        path: of the page.
        runs: state and metrics of each.
        embed: put the images into the page, which else links the files in samples/.
        max_bytes: of the files that are put into it.

    Raises:
        ValueError: it cannot be written.
    """
    contents = []
    for reading, metrics in runs:
        if len(runs) > 1:
            last = {name: steps[-1:] for name, steps in reading.images.items()}
            reading = replace(reading, images=last)
        if embed:
            images, left_out = embedded_images(reading, max_bytes // len(runs))
            if left_out:
                reading.notes.append(f"{left_out} images are left out of this file, for their size")
        else:
            images = linked_images(reading, path.parent)
        contents.append(page_content(reading, metrics, images, MAX_NUMBERS // len(runs)))
    content = contents[0] if len(runs) == 1 else comparison_content(runs, contents)
    remove_temporaries(path.parent)  # of a killed process
    replace_file(path, render(content, linked=not embed))


def render(content: dict[str, Any], linked: bool = True) -> bytes:
    """Return the page: `content` as JSON, with the style and the scripts that show it.

    Images may be files beside it where they are `linked`.
    """
    title = f"{content['run']['name']}: {content['run']['state']}"
    return render_page(__package__, SCRIPTS, title, content, links=linked)


def page_content(
    reading: RunReading,
    metrics: MetricsFile,
    images: list[dict[str, Any]],
    max_numbers: int = MAX_NUMBERS,
) -> dict[str, Any]:
    """Return the content of a run's page: finite numbers, text, lists and dicts.

    `images` come from `linked_images` or `embedded_images`. The series of `metrics` are thinned
    further where they are too many for a page.
    """
    _fit(metrics, max_numbers)
    axes = _Axes()
    factor = None if reading.pixels is None else 1.0 / (math.log(2.0) * reading.pixels)
    scalars: dict[str, Any] = {}
    for key, series in metrics.scalars.items():
        scalars[key] = _scalar(series, axes)
        split, name = split_of(key)
        if name == "kl_loss" and factor is not None:
            step, value = series.latest
            bits = {"of": key, "factor": factor, "latest": [step, _plain(value * factor)]}
            scalars[f"{split}/{BITS}"] = bits
    constants, panels = _panels(metrics, scalars)
    return {
        "run": _about(reading, metrics),
        "axes": axes.all,
        "scalars": {key: scalars[key] for key in in_order(scalars)},
        "constants": constants,
        "panels": panels,
        "vectors": [
            {
                "key": key,
                "axis": axes.index([steps for steps in vector.steps], None),
                "values": [[_round(x, 4) for x in means] for means in vector.means],
            }
            for key, vector in sorted(metrics.vectors.items())
            if vector.steps
        ],
        "images": images,
        "config": reading.config_text,
    }


def comparison_content(
    runs: Sequence[tuple[RunReading, MetricsFile]], contents: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of a page that compares runs, of the contents of their own pages.

    A plot shows one metric of all runs.
    """
    readings, files = [reading for reading, _ in runs], [metrics for _, metrics in runs]
    names = run_names([reading.run for reading in readings])
    ends = {"running"} & {x.state for x in readings} or {x.state for x in readings}
    panels = []
    for panel, keys in panels_of(dict.fromkeys(key for x in contents for key in x["scalars"])):
        for key in keys:
            series = [file.scalars[key] for file in files if key in file.scalars]
            if not (panel.quiet and series and all(map(_is_constant, series))):
                unit = "" if panel.unit in key else f"{panel.unit}, "
                panels.append({**_panel(panel, [key]), "unit": unit + key})
    images = [
        {**image, "name": f"{name}: {image['name']}", "of": image["name"]}
        for name, content in zip(names, contents, strict=True)
        for image in content["images"]
    ]
    return {
        "run": {
            "name": ", ".join(names),
            "state": ends.pop() if len(ends) == 1 else "ended",
            "lines": sum(file.lines for file in files),
            "made": time.time(),
            "version": __version__,
        },
        "runs": [
            {"name": name, "axes": content["axes"], "scalars": content["scalars"]}
            for name, content in zip(names, contents, strict=True)
        ],
        "panels": panels,
        "images": sorted(images, key=lambda image: image["of"] != "reconstructions"),
        "tables": [
            ["overview", "runs", states(readings)],
            ["overview", "last metrics", last_metrics(files)],
            ["overview", "best metrics", best_metrics(files)],
            ["differences", "key", config_differences(readings)],
        ],
    }


def _about(reading: RunReading, metrics: MetricsFile) -> dict[str, Any]:
    last = {
        key: _plain(metrics.scalars[key].latest[1])
        for key in ("epoch", "images_seen", "skipped_steps", "skipped_by_scaler")
        if key in metrics.scalars
    }
    return {
        "name": display_name(reading.run.absolute().name or reading.run.absolute()),
        "path": display_name(reading.run.absolute()),
        "state": reading.state,
        "remark": reading.remark,
        "step": reading.step,
        "total_steps": reading.total_steps,
        "written": reading.written,
        "made": time.time(),
        "speed": reading.speed,
        "batch": reading.setting("training", "global_batch_size"),
        "seconds_left": reading.seconds_left,
        "last": last,
        "best": reading.best,
        "checkpoints": reading.checkpoints[:50],
        "number_checkpoints": len(reading.checkpoints),
        "bad_images": reading.bad_images,
        "number_bad": reading.number_bad,
        "lines": metrics.lines,
        "notes": reading.notes,
        "version": __version__,
    }


def _panels(
    metrics: MetricsFile, scalars: dict[str, Any]
) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """Return the metrics that never change, with their values, and the plots of the others."""
    constants, panels = [], []
    for panel, keys in panels_of(scalars):
        shown = []
        for key in keys:
            series = metrics.scalars.get(key)
            if panel.quiet and series is not None and _is_constant(series):
                constants.append([key, _plain(series.latest[1])])
            else:
                shown.append(key)
        if shown:
            panels.append(_panel(panel, shown))
    return constants, panels


def _panel(panel: Panel, keys: list[str]) -> dict[str, Any]:
    return {
        "title": panel.title,
        "unit": panel.unit,
        "keys": keys,
        "log": panel.log,
        "smooth": panel.smooth,
    }


def _is_constant(series: Series) -> bool:
    low, high = series.range
    return low >= high and not any(bucket.broken for bucket in series.buckets)


def _fit(metrics: MetricsFile, max_numbers: int) -> None:
    """Thin the longest series until all are small enough together."""

    def size(series: Series) -> int:
        return len(series.buckets) * (3 if series.thinned else 1)

    sizes = {key: size(series) for key, series in metrics.scalars.items()}
    while sum(sizes.values()) > max_numbers:
        key = max(sizes, key=lambda key: sizes[key])
        metrics.scalars[key].halve()
        sizes[key] = size(metrics.scalars[key])


class _Axes:
    """The steps of series, each kept once; most series share theirs."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self._indices: dict[Any, int] = {}

    def index(self, steps: list[tuple[int, int]], counts: list[int] | None) -> int:
        """Return the index of the axis of buckets with these first and last steps."""
        key = (tuple(steps), None if counts is None else tuple(counts))
        if key not in self._indices:
            self._indices[key] = len(self.all)
            axis: dict[str, Any] = {"steps": [(first + last) // 2 for first, last in steps]}
            if counts is not None:
                axis["counts"] = counts
            self.all.append(axis)
        return self._indices[key]


def _scalar(series: Series, axes: _Axes) -> dict[str, Any]:
    buckets = series.buckets
    counts = [bucket.count for bucket in buckets] if series.thinned else None
    content: dict[str, Any] = {
        "axis": axes.index([(bucket.first, bucket.last) for bucket in buckets], counts),
        "mean": [_round(bucket.mean) for bucket in buckets],
        "latest": [series.latest[0], _plain(series.latest[1])],
    }
    if series.thinned:
        content["low"] = [_round(bucket.low) for bucket in buckets]
        content["high"] = [_round(bucket.high) for bucket in buckets]
    broken = [
        [i, bucket.broken, ", ".join(sorted(bucket.kinds))]
        for i, bucket in enumerate(buckets)
        if bucket.broken
    ]
    return {**content, "broken": broken} if broken else content


def _round(number: float | None, digits: int = 6) -> float | int | None:
    """Round to significant digits; None where it is not finite."""
    if number is None or not math.isfinite(number):
        return None
    rounded = float(f"{number:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _plain(number: float) -> float | str:
    """Return a finite number as it is, another as text."""
    return number if math.isfinite(number) else str(number)


def linked_images(reading: RunReading, folder: Path) -> list[dict[str, Any]]:
    """Return the images by name, with the address that a page in `folder` finds them at."""
    samples = (reading.run / SAMPLES).absolute()
    try:
        base = quote(Path(os.path.relpath(samples, folder.absolute())).as_posix())
    except ValueError:  # on another drive
        base = samples.as_uri()
    return [
        {"name": name, "steps": _evenly(steps, MAX_STEPS), "base": f"{base}/{quote(name)}_"}
        for name, steps in reading.images.items()
    ]


def embedded_images(
    reading: RunReading, max_bytes: int = MAX_EMBEDDED_BYTES
) -> tuple[list[dict[str, Any]], int]:
    """Return the images by name with their content, and the number of those left out.

    Where all of them are more than `max_bytes` evenly spaced steps are taken, with the last.
    """
    images, left_out = [], 0
    for name, steps in reading.images.items():
        paths = {text: reading.run / SAMPLES / f"{name}_{text}.png" for text in steps}
        sizes = {text: _size(path) for text, path in paths.items()}
        room, chosen = max_bytes // len(reading.images), steps
        while len(chosen) > 1 and sum(sizes[text] for text in chosen) > room:
            chosen = _evenly(steps, len(chosen) * 3 // 4)
        left_out += len(steps) - len(chosen)
        content = {text: _data_uri(paths[text]) for text in chosen}
        found = {text: uri for text, uri in content.items() if uri}
        images.append({"name": name, "steps": list(found), "content": list(found.values())})
    return images, left_out


def _evenly(items: list[str], number: int) -> list[str]:
    """Return this number of items, evenly spaced, with the first and the last; of one the last."""
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
    """Return a PNG file as a URI; empty where it cannot be read."""
    try:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return ""
