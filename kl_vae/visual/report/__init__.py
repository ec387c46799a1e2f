"""A page, or some lines for a terminal, on what a run has done so far.

`metrics` reads metrics.jsonl into thinned series, `run` the rest of a run's directory; `panels`
says which metrics share a plot; `page` writes one HTML file with the scripts in web/, `terminal`
text. `report` is the one call for all of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kl_vae.checkpoints.run_files import METRICS
from kl_vae.visual.report.metrics import MetricsFile
from kl_vae.visual.report.page import REPORT, check_output, write_page
from kl_vae.visual.report.run import RunReading, check_run_directory, read_run
from kl_vae.visual.report.terminal import describe_run


@dataclass(frozen=True)
class RunReport:
    """What `report` returns.

    Attributes:
        reading: the state of the run.
        metrics: its metrics.
        page: the page that was written; None where none was asked for.
    """

    reading: RunReading
    metrics: MetricsFile
    page: Path | None

    @property
    def text(self) -> str:
        """Some lines on the state of the run and its last metrics."""
        return "\n".join(describe_run(self.reading, self.metrics))


def report(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    write: bool = True,
    embed: bool = False,
    watch_seconds: float | None = None,
    on_report: Callable[[RunReport], object] = lambda report: None,
) -> RunReport:
    """Read a run, while it is running or afterwards, and write its page of curves and images.

    Args:
        run_dir: the run's directory.
        out: the page; None: report.html in the run.
        write: write the page; without it only the result is returned.
        embed: put the images into the page, to send one file.
        watch_seconds: repeat at this interval until the run ends or Ctrl-C; None: once.
        on_report: called with each report.

    Raises:
        ValueError: there is no run, or the page cannot be written.
    """
    run = Path(run_dir)
    check_run_directory(run)
    page = (run / REPORT if out is None else Path(out)) if write else None
    if page is not None:
        check_output(page)
    metrics = MetricsFile(run / METRICS)

    def report_once() -> RunReport:
        _read_with_bar(metrics, run / METRICS)
        result = RunReport(read_run(run, metrics), metrics, page)
        if page is not None:
            write_page(page, result.reading, metrics, embed)
        on_report(result)
        return result

    result = report_once()
    with contextlib.suppress(KeyboardInterrupt):  # a page is whole at any time
        while watch_seconds is not None and result.reading.state == "running":
            time.sleep(watch_seconds)
            result = report_once()
    return result


def _read_with_bar(metrics: MetricsFile, path: Path) -> None:
    """Read the new lines, with a progress bar where that takes long."""
    from tqdm import tqdm

    size = path.stat().st_size if path.is_file() else 0
    with tqdm(total=size, unit="B", unit_scale=True, delay=1.0, leave=False, disable=None) as bar:
        metrics.read(bar.update)
