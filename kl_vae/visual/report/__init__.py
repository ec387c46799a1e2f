"""A page, or some lines for a terminal, on what one or several runs have done so far.

`metrics` reads metrics.jsonl into thinned series, `run` the rest of a run's directory; `panels`
says which metrics share a plot; `comparison` makes tables of several runs; `page` writes one HTML
file with the scripts in web/, `terminal` text. `report` is the one call for all of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kl_vae.checkpoints.run_files import METRICS
from kl_vae.runtime.schema import printable
from kl_vae.visual.report.comparison import as_text, last_metrics, run_names
from kl_vae.visual.report.metrics import MetricsFile
from kl_vae.visual.report.page import REPORT, check_output, write_page
from kl_vae.visual.report.run import RunReading, check_run_directory, read_run
from kl_vae.visual.report.terminal import describe_run


@dataclass(frozen=True)
class RunReport:
    """What `report` returns.

    Attributes:
        runs: the state and the metrics of each run.
        page: the page that was written; None where none was asked for.
    """

    runs: tuple[tuple[RunReading, MetricsFile], ...]
    page: Path | None

    @property
    def reading(self) -> RunReading:
        """The state of the first run."""
        return self.runs[0][0]

    @property
    def metrics(self) -> MetricsFile:
        """The metrics of the first run."""
        return self.runs[0][1]

    @property
    def number_running(self) -> int:
        """Number of runs that are running."""
        return sum(reading.state == "running" for reading, _ in self.runs)

    @property
    def text(self) -> str:
        """Some lines on each run and its last metrics; of several also these in one table."""
        blocks = [describe_run(reading, metrics) for reading, metrics in self.runs]
        if len(self.runs) > 1:
            names = run_names([reading.run for reading, _ in self.runs])
            rows = last_metrics([metrics for _, metrics in self.runs])
            blocks.append(as_text("last metrics", names, rows))
        return "\n\n".join("\n".join(map(printable, block)) for block in blocks)


def report(
    run_dir: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    write: bool = True,
    embed: bool = False,
    watch_seconds: float | None = None,
    on_report: Callable[[RunReport], object] = lambda report: None,
) -> RunReport:
    """Read runs, while they are running or afterwards, and write a page of curves and images.

    Args:
        run_dir: the run's directory; of several runs a list, whose page compares them.
        out: the page; None: report.html in the run, of several in the current directory.
        write: write the page; without it only the result is returned.
        embed: put the images into the page, to send one file.
        watch_seconds: repeat at this interval until all runs have ended or Ctrl-C; None: once.
        on_report: called with each report.

    Raises:
        ValueError: there is no run, one is given twice, or the page cannot be written.
    """
    runs = [Path(run) for run in ([run_dir] if isinstance(run_dir, (str, Path)) else run_dir)]
    if not runs:
        raise ValueError("run_dir=[]: give the directory of a run, such as runs/NAME")
    for run in runs:
        check_run_directory(run)
    run_names(runs)  # are there, so that each is given once
    page = None
    if write:
        folder = runs[0] if len(runs) == 1 else Path()
        page = folder / REPORT if out is None else Path(out)
        check_output(page)
    files = [MetricsFile(run / METRICS) for run in runs]

    def report_once() -> RunReport:
        for run, metrics in zip(runs, files, strict=True):
            _read_with_bar(metrics, run / METRICS)
        readings = [read_run(run, metrics) for run, metrics in zip(runs, files, strict=True)]
        result = RunReport(tuple(zip(readings, files, strict=True)), page)
        if page is not None:
            write_page(page, result.runs, embed)
        on_report(result)
        return result

    result = report_once()
    with contextlib.suppress(KeyboardInterrupt):  # a page is whole at any time
        while watch_seconds is not None and result.number_running:
            time.sleep(watch_seconds)
            result = report_once()
    return result


def _read_with_bar(metrics: MetricsFile, path: Path) -> None:
    """Read the new lines, with a progress bar where that takes long."""
    from tqdm import tqdm

    size = path.stat().st_size if path.is_file() else 0
    with tqdm(total=size, unit="B", unit_scale=True, delay=1.0, leave=False, disable=None) as bar:
        metrics.read(bar.update)
