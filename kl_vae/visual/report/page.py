"""One HTML file on a run, which needs no network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kl_vae.runtime.files import display_name
from kl_vae.runtime.outputs import replace_file
from kl_vae.visual.report.content import page_content
from kl_vae.visual.report.metrics_file import MetricsFile
from kl_vae.visual.report.pictures import (
    MAX_EMBEDDED_BYTES,
    embedded_pictures,
    linked_pictures,
)
from kl_vae.visual.report.run_reading import RunReading
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
    reading: RunReading,
    metrics: MetricsFile,
    embed: bool = False,
    max_bytes: int = MAX_EMBEDDED_BYTES,
) -> None:
    """Write the page of a run, whole or not at all.

    Args:
        path: of the page.
        reading: of the run.
        metrics: of the run.
        embed: put the pictures into the page, which else names the files in samples/.
        max_bytes: of the files that are put into it.

    Raises:
        ValueError: it cannot be written.
    """
    if embed:
        pictures, left_out = embedded_pictures(reading, max_bytes)
        if left_out:
            reading.notes.append(f"{left_out} pictures are left out of this file, for their size")
    else:
        pictures = linked_pictures(reading, path.parent)
    content = page_content(reading, metrics, pictures)
    replace_file(path, render(content, linked=not embed))


def render(content: dict[str, Any], linked: bool = True) -> bytes:
    """The page: `content` as JSON, with the style and the scripts that show it.

    Pictures may be files beside it where they are `linked`.
    """
    title = f"{content['run']['name']}: {content['run']['state']}"
    return render_page(__package__, SCRIPTS, title, content, links=linked)
