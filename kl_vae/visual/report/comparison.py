"""Several runs side by side: their names, and tables with a row per fact and a column per run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kl_vae.checkpoints.run_files import CONFIG
from kl_vae.runtime.config_file import parse_yaml
from kl_vae.runtime.files import display_name
from kl_vae.visual.report.metrics import MetricsFile, Series
from kl_vae.visual.report.panels import NOT_PLOTTED, in_order, panel_of, split_of
from kl_vae.visual.report.run import RunReading, duration
from kl_vae.visual.report.terminal import describe_best

Table = list[list[str]]  # per row a label, then a cell per run


def run_names(runs: Sequence[Path]) -> list[str]:
    """Return the folder name of each run, after as many parents as tell equal names apart.

    Raises:
        ValueError: a run is given twice.
    """
    paths = [Path(os.path.abspath(run)) for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ValueError(f"{display_name(runs[i])}: is given twice; give each run once")
    depths = [1] * len(paths)
    while True:
        names = [
            os.path.join(*path.parts[-depth:]) for path, depth in zip(paths, depths, strict=True)
        ]
        equal = [i for i, name in enumerate(names) if names.count(name) > 1]
        if not equal:
            return [display_name(name) for name in names]
        for i in equal:
            depths[i] += 1


def states(readings: Sequence[RunReading]) -> Table:
    """Return the state, progress, speed, best checkpoint and remarks of each run."""
    rows = [
        ["state", *(x.state for x in readings)],
        ["step", *(x.progress.removeprefix("step ") for x in readings)],
        ["images/s", *("" if x.speed is None else f"{x.speed:.4g}" for x in readings)],
        [
            "time left",
            *("" if x.seconds_left is None else duration(x.seconds_left) for x in readings),
        ],
        ["best checkpoint", *(describe_best(x) for x in readings)],
        ["bad images", *(str(x.number_bad or "") for x in readings)],
        ["remarks", *("; ".join(filter(None, [x.remark, *x.notes])) for x in readings)],
    ]
    return [row for row in rows if any(row[1:])]


def last_metrics(files: Sequence[MetricsFile]) -> Table:
    """Return the last value of each metric."""
    keys = dict.fromkeys(key for file in files for key in file.scalars)
    return [
        [
            _label(key),
            *(
                f"{file.scalars[key].latest[1]:.5g}" if key in file.scalars else ""
                for file in files
            ),
        ]
        for key in in_order(keys)
        if split_of(key)[1] not in NOT_PLOTTED
    ]


def best_metrics(files: Sequence[MetricsFile]) -> Table:
    """Return the best value of each metric of validations that has one, and its step."""
    keys = dict.fromkeys(key for file in files for key in file.scalars if key.startswith("val"))
    return [
        [
            f"{_label(key)}, {best}",
            *(_best(file.scalars[key], best) if key in file.scalars else "" for file in files),
        ]
        for key in in_order(keys)
        if (best := panel_of(key).best)
    ]


def config_differences(readings: Sequence[RunReading]) -> Table:
    """Return the keys of the configs whose values differ; `not set` where a config has none."""
    configs = [_settings(reading) for reading in readings]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [[key, *(config.get(key, "not set") for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def as_text(title: str, names: Sequence[str], rows: Table) -> list[str]:
    """Return a table as lines of aligned columns."""
    table = [[title, *names], *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]


def _label(key: str) -> str:
    """Return a metric with its unit."""
    unit = panel_of(key).unit
    return key if not unit or unit in key else f"{key} ({unit})"


def _best(series: Series, best: str) -> str:
    if best == "highest":
        bucket = max(series.buckets, key=lambda bucket: bucket.high)
        value = bucket.high
    else:
        bucket = min(series.buckets, key=lambda bucket: bucket.low)
        value = bucket.low
    return f"{value:.5g} at step {bucket.last}" if math.isfinite(value) else "none"


def _settings(reading: RunReading) -> dict[str, str]:
    """Return the values of a config by their dotted keys; none of one that cannot be read."""
    flat: dict[str, str] = {}

    def add(tree: Any, path: str) -> None:
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                add(value, f"{path}.{key}" if path else str(key))
        else:
            flat[path] = (
                tree if isinstance(tree, str) else json.dumps(tree, default=str, skipkeys=True)
            )

    try:  # refuses aliases, which may be without end
        config = parse_yaml(reading.config_text, CONFIG)
    except ValueError:
        return {}
    if isinstance(config, dict):
        add(config, "")
    return flat
