"""Memory and time of the ways to large images, and what blending changes."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.benchmark import tiling
from kl_vae.benchmark.peak import Cost
from kl_vae.benchmark.seams import compare_seams
from kl_vae.benchmark.tiling import DIFFUSERS, EXACT, TILED, WAYS, WHOLE, Measured, plot, table
from kl_vae.ddconfig import DDConfig
from kl_vae.runtime.errors import RunError

CPU = torch.device("cpu")
DDCONFIG = DDConfig(
    ch=32,
    ch_mult=[1, 2],
    num_res_blocks=1,
    attn_resolutions=[],
    in_channels=3,
    out_ch=3,
    resolution=32,
    z_channels=4,
)
GB = 10**9


def in_this_process(monkeypatch: pytest.MonkeyPatch, without: str = "") -> list[str]:
    """Let `measure` compute here, where memory is not known, and tell which ways it took."""
    ways = []

    def cost_of(call: partial[object], device: torch.device, threads: int) -> Cost:
        way = call.args[2]
        ways.append(way)
        if way == without:
            raise RunError("a measurement ended without a word")
        call()()  # type: ignore[operator]
        return Cost(float(len(ways)), before=GB, peak=(2 + len(ways)) * GB)

    monkeypatch.setattr(tiling, "cost_of", cost_of)
    return ways


def test_all_ways_compute_the_same_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    ways = in_this_process(monkeypatch)
    found = list(tiling.measure(DDCONFIG, 4, CPU, [(32, 64)], repeats=2))
    assert [(m.what, m.way) for m in found] == [(w, x) for w in ("decode", "encode") for x in WAYS]
    assert ways == 2 * [*WAYS, *WAYS[1:], WAYS[0]]
    whole, exact, theirs, tiled = found[:4]
    assert (whole.width, whole.height, whole.seconds) == (32, 64, (1.0, 8.0))
    assert (exact.peak, exact.added) == (7 * GB, 6 * GB)
    assert whole.difference == 0.0
    for m in found:  # smaller than a tile: theirs is whole, too
        assert m.difference is not None and m.difference < 1e-4
    assert (theirs.way, tiled.way) == (DIFFUSERS, TILED)


def test_what_the_memory_does_not_suffice_for_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ways = in_this_process(monkeypatch, without=WHOLE)
    with caplog.at_level(logging.WARNING):
        (exact,) = tiling.measure(DDCONFIG, 4, CPU, [(32, 32)], 2, "fp32", ["decode"], [EXACT])
    assert ways == [WHOLE, EXACT, EXACT]
    assert exact.way == EXACT and exact.difference is None
    assert caplog.messages == [
        "decode 32 x 32, whole: left out: a measurement ended without a word"
    ]
    assert table([exact]).splitlines()[2] == "| decode | 32 x 32 | exact | 2.5 |  | 5.00 |  |  |  |"


MEASURED = Measured("decode", WHOLE, 64, 32, (2.0, 4.0, 3.0), 4 * GB, 3 * GB, 0.0)


def test_the_table_has_ratios_to_the_same_size() -> None:
    exact = replace(MEASURED, way=EXACT, seconds=(3.6,), peak=2 * GB, difference=2e-5)
    theirs = replace(MEASURED, way=DIFFUSERS, peak=8 * GB)
    larger = replace(MEASURED, width=128, peak=16 * GB)
    lines = table([MEASURED, exact, theirs, larger]).splitlines()
    assert lines[2] == "| decode | 64 x 32 | whole | 3 | 1.00 | 4.00 | 1.00 | 0.50 | 0.0e+00 |"
    assert lines[3] == "| decode | 64 x 32 | exact | 3.6 | 1.20 | 2.00 | 0.50 | 0.25 | 2.0e-05 |"
    assert lines[5] == "| decode | 128 x 32 | whole | 3 | 1.00 | 16.00 | 1.00 |  | 0.0e+00 |"


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    larger = replace(MEASURED, width=128, what="encode")
    plot([MEASURED, larger], tmp_path / "plot.png", "a machine")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(10**6)) > 10
    text = r"--plot .*plot.xyz: cannot be written \(.*xyz.*\); give a .png"
    with pytest.raises(ValueError, match=text):
        plot([MEASURED], tmp_path / "plot.xyz", "a machine")


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'^plots need matplotlib: pip install "kl-vae\[plots\]"$'):
        plot([MEASURED], tmp_path / "plot.png", "a machine")


@pytest.mark.parametrize("embed_dim", [3, 4])
def test_blended_tiles_change_what_exact_strips_do_not(
    embed_dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = AutoEncoderKL(DDCONFIG, embed_dim).eval()
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    image += torch.linspace(-1.0, 1.0, 64)  # a group norm sees another mean in each tile
    changes = compare_seams(model, [image.clamp(-1.0, 1.0)], tile=32, overlap=8)
    exact, blend, *theirs = changes.values()
    assert list(changes)[:2] == ["exact", "blend, tiles of 32, overlap 8"]
    assert exact.largest < 0.01
    said = "without diffusers' tiles: diffusers cannot express this model: embed_dim=3: it has lat"
    if embed_dim == 3:
        assert caplog.messages[0].startswith(said)
    else:
        assert list(changes)[2:] == ["diffusers, tiles of 32, overlap 8"]
    for change in (blend, *theirs):
        assert change.largest > 20 * exact.largest
        assert change.largest >= change.colour > exact.colour
