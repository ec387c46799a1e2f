"""A page to look at reconstructions beside their images: one HTML file, which works offline.

It holds the metrics of all images as JSON; the parts in web/gallery/ are what shows them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from kl_vae.runtime.files import display_name
from kl_vae.runtime.outputs import replace_file
from kl_vae.visual.web_page import render_page

GALLERY = "index.html"
SCRIPTS = (
    "data.js",
    "elements.js",
    "histogram.js",
    "head.js",
    "grid.js",
    "zoom.js",
    "viewer.js",
    "pointers.js",
    "address.js",
    "page.js",
)


@dataclass(frozen=True)
class GalleryImage:
    """An image and its reconstruction, as files; their paths are POSIX, relative to the page.

    Attributes:
        name: of the image, to be shown.
        original: image of the image as the model saw it.
        reconstruction: image of the same size.
        thumbnail: a small image of both, side by side.
        width: of original and reconstruction, in pixels.
        height: of both.
        metrics: values by name, such as psnr, ssim and lpips; None or NaN: it has none.
    """

    name: str
    original: str
    reconstruction: str
    thumbnail: str
    width: int
    height: int
    metrics: Mapping[str, float | None]


def write_gallery(path: Path, images: Sequence[GalleryImage], about: Mapping[str, str]) -> None:
    """Write the page of `images`, which need not exist yet; it is there whole or not at all.

    Args:
        path: the page, by custom index.html.
        images: in the order of the input.
        about: what they were made with, shown in this order; the first is in the page's title.

    Raises:
        ValueError: an image's path is absolute, or the page cannot be written.
    """
    for image in images:
        for file in (image.original, image.reconstruction, image.thumbnail):
            if file.startswith("/"):
                raise ValueError(
                    f"{display_name(file)}: is absolute; give images relative to the page"
                )
    title = " · ".join(["Reconstructions", *list(about.values())[:1]])
    data = _page_data(images, about)
    page = render_page("kl_vae.visual", SCRIPTS, title, data, folder="web/gallery")
    replace_file(path, page)


def _page_data(images: Sequence[GalleryImage], about: Mapping[str, str]) -> dict[str, object]:
    """Return the page's data: a row of each image, its metrics in the order of `metrics`."""
    names = {name: None for image in images for name in image.metrics}  # each once, in order
    columns = {name: [_value(image.metrics.get(name)) for image in images] for name in names}
    columns = {name: column for name, column in columns.items() if set(column) != {None}}
    rows = [
        [
            display_name(image.name),
            _url(image.original),
            _url(image.reconstruction),
            _url(image.thumbnail),
            image.width,
            image.height,
            *(column[i] for column in columns.values()),
        ]
        for i, image in enumerate(images)
    ]
    return {"about": dict(about), "metrics": list(columns), "images": rows}


def _value(value: float | None) -> float | str | None:
    """Return a metric for JSON, without infinity and NaN; JavaScript's Number() reads the text."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return round(value, 6)


def _url(path: str) -> str:
    """Return a relative URL of a file, for any bytes in its name."""
    return quote(os.fsencode(path))
