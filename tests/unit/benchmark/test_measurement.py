"""Rows of measurements, and what follows from them."""

from dataclasses import replace
from pathlib import Path

import pytest

from kl_vae.benchmark.measurement import Measurement, table
from kl_vae.benchmark.plots import plot_growth
from kl_vae.benchmark.timing import Timing

THEIRS = Measurement(
    work="decode",
    way="diffusers",
    batch_size=2,
    size=256,
    timing=Timing(4.0, 3.0, 6.0),
    flops=400 * 10**9,
    product_rate=200e9,
    difference=0.0,
)
OURS = replace(THEIRS, way="ours", timing=Timing(2.0, 1.5, 2.5), difference=2e-5)


def test_what_follows_by_hand() -> None:
    assert (OURS.images_per_second, OURS.rate, OURS.share) == (1.0, 200e9, 1.0)
    assert OURS.figures.items() >= {"way": "ours", "share": 1.0, "rate": 200e9}.items()
    assert OURS.figures["timing"] == {"median": 2.0, "low": 1.5, "high": 2.5}


def test_the_table() -> None:
    larger = replace(OURS, size=512, timing=Timing(8.0, 8.0, 8.0), difference=None)
    lines = table([THEIRS, OURS, larger], "images").splitlines()
    assert lines[2] == (
        "| diffusers | 2 x 256 x 256 | 4 | 3 to 6 | 0.5 | 1.00 | 100 | 50% | 0.0e+00 |"
    )
    assert lines[3] == "| ours | 2 x 256 x 256 | 2 | 1.5 to 2.5 | 1 | 2.00 | 200 | 100% | 2.0e-05 |"
    assert lines[4] == "| ours | 2 x 512 x 512 | 8 | 8 to 8 | 0.25 | 1.00 | 50 | 25% |  |"
    text = "\n".join(lines)
    assert "2 x 256 x 256: 400 GFLOP (convolutions and matrix products of the plain" in text
    assert "a matrix product runs at 200 GFLOP/s." in text
    assert "Speed is relative to: diffusers. Difference: the largest absolute one of the i" in text
    assert "waits for the GPU" not in text
    waiting = table([replace(OURS, synchronisations=3)])
    assert "ours: the CPU waits for the GPU 3 times a step." in waiting


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    larger = [replace(m, size=512, timing=Timing(16.0, 15.0, 17.0)) for m in (THEIRS, OURS)]
    plot_growth([THEIRS, OURS, *larger], tmp_path / "growth.png", "a machine")
    with Image.open(tmp_path / "growth.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(10**6)) > 10
    with pytest.raises(ValueError, match=r"--plot .*growth.xyz: cannot be written \(.*xyz.*\)"):
        plot_growth([THEIRS], tmp_path / "growth.xyz", "a machine")
