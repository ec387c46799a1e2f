"""What a page shows, as plain values for its script."""

from __future__ import annotations

import math
import time
from typing import Any

from kl_vae import __version__
from kl_vae.runtime.files import display_name
from kl_vae.visual.report.metrics_file import MetricsFile
from kl_vae.visual.report.panels import BITS, Panel, in_order, panels_of, split_of
from kl_vae.visual.report.run_reading import RunReading
from kl_vae.visual.report.series import Series

MAX_NUMBERS = 150_000  # of all scalars together, about 8 bytes each


def page_content(
    reading: RunReading, metrics: MetricsFile, pictures: list[dict[str, Any]]
) -> dict[str, Any]:
    """All that the page of a run shows: finite numbers, text, lists and dicts.

    `pictures` are what `kl_vae.visual.report.pictures` gives. The series of `metrics` are thinned
    further where they are too many for a page.
    """
    _fit(metrics)
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
        "pictures": pictures,
        "config": reading.config_text,
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
    """The figures that never change, with their values, and the plots of the others."""
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
        **{"title": panel.title, "unit": panel.unit, "keys": keys},
        **{"log": panel.log, "smooth": panel.smooth},
    }


def _is_constant(series: Series) -> bool:
    low, high = series.range
    return low >= high and not any(bucket.broken for bucket in series.buckets)


def _fit(metrics: MetricsFile) -> None:
    """Thin the longest series until all are small enough together."""

    def size(series: Series) -> int:
        return len(series.buckets) * (3 if series.thinned else 1)

    sizes = {key: size(series) for key, series in metrics.scalars.items()}
    while sum(sizes.values()) > MAX_NUMBERS:
        key = max(sizes, key=lambda key: sizes[key])
        metrics.scalars[key].halve()
        sizes[key] = size(metrics.scalars[key])


class _Axes:
    """The steps of series, each kept once; most series share theirs."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self._indices: dict[Any, int] = {}

    def index(self, steps: list[tuple[int, int]], counts: list[int] | None) -> int:
        """The number of the axis of buckets that reach from step to step."""
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
    """To this many significant digits; None where it is not finite."""
    if number is None or not math.isfinite(number):
        return None
    rounded = float(f"{number:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _plain(number: float) -> float | str:
    """Finite, or text that says what it is."""
    return number if math.isfinite(number) else str(number)
