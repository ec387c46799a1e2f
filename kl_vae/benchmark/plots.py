"""Drawings of what was measured; matplotlib is imported when one is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kl_vae.benchmark.measurement import MATRIX_PRODUCT, Measurement

_LINES = ("-", "--", ":", "-.")  # of numbers of images


def matplotlib_figure() -> Any:
    """Return matplotlib's Figure.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('plots need matplotlib: pip install "kl-vae[plots]"') from None
    return Figure


def save_figure(figure: Any, path: Path) -> None:
    """Write what was drawn.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path}: cannot be written ({error}); give a .png") from error


def plot_growth(measurements: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw seconds and the share of a matrix product's rate against the pixels of a call.

    A line for each way and number of images. Seconds that grow as the pixels do are a line of slope
    1; above that lies what grows faster, such as attention.

    Raises:
        ValueError: matplotlib is not installed, or the file cannot be written.
    """
    Figure = matplotlib_figure()  # noqa: N806 - a class
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    values: tuple[tuple[str, Callable[[Measurement], float]], ...] = (
        ("seconds", lambda m: m.timing.median),
        (f"rate, of {MATRIX_PRODUCT}", lambda m: m.share),
    )
    ways = dict.fromkeys(m.way for m in measurements)
    batch_sizes = dict.fromkeys(m.batch_size for m in measurements)
    for axis, (label, value) in zip(axes, values, strict=True):
        for number, way in enumerate(ways):
            for batch_size, line in zip(batch_sizes, _LINES * len(batch_sizes), strict=False):
                points = [m for m in measurements if (m.way, m.batch_size) == (way, batch_size)]
                axis.plot(
                    [m.batch_size * m.size**2 / 1e6 for m in points],
                    [value(m) for m in points],
                    marker="o",
                    color=f"C{number}",
                    linestyle=line,
                    label=f"{way}, batch {batch_size}",
                )
        axis.set_xscale("log")
        axis.set_xlabel("megapixels of a call")
        axis.set_ylabel(label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0.0)
    axes[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    save_figure(figure, path)
