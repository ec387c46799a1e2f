"""Comparing recipes: what is run, and how the figures are read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kl_vae.benchmark.comparison import Point, _read_points, sooner, table
from kl_vae.benchmark.recipes import RECIPES, Entry, Setting


def test_entries_are_read_from_text() -> None:
    assert Entry.parse("ours:300") == Entry("ours", 300)
    entry = Entry.parse("published:600:4.0e-4")
    assert entry == Entry("published", 600, 4e-4)
    assert entry.name == "published at 0.0004"


@pytest.mark.parametrize(
    "text", ["", "ours", "best:300", "ours:many", "ours:0", "ours:3:x", "ours:3:1:1"]
)
def test_what_is_no_entry_is_named(text: str) -> None:
    with pytest.raises(
        ValueError, match=f"recipe '{text}': write RECIPE:STEPS or .*published, ours"
    ):
        Entry.parse(text)


def test_recipes_differ_in_what_they_say_they_do() -> None:
    setting = Setting("quickstart", ("data.resize=96",), Path("features.pth"), Path("out"))
    configs = {name: setting.run_config(Entry(name, 60), seed=3) for name in RECIPES}
    for config in configs.values():
        assert (config.training.seed, config.training.max_steps) == (3, 60)
        assert config.training.validate_every_steps == 10
        assert config.data.resize == 96
    published, ours = configs["published"], configs["ours"]
    assert (published.optimizer.name, published.optimizer.betas) == ("adam", (0.5, 0.9))
    assert published.optimizer.schedule == "constant"
    assert ours.optimizer.name == "muon" and ours.optimizer.schedule == "cosine"
    losses = {name: config.model.params.lossconfig["params"] for name, config in configs.items()}  # type: ignore[index]
    assert losses["published"] == {**losses["ours"], "reduction": "sum"}  # one objective
    assert losses["ours"]["perceptual_features"] == "features.pth"
    assert losses["mse"] == {"kl_weight": 1e-6}
    assert (losses["gan"]["perceptual_start"], losses["gan"]["disc_start"]) == (30, 36)
    assert losses["ours"]["disc_start"] > 10**8
    for rate in (0.5, 5e-5):  # YAML reads 5e-05 as text
        assert setting.run_config(Entry("ours", 60, rate), 0).optimizer.learning_rate == rate


def runs(psnrs: list[list[float]], seconds_a_step: float) -> list[list[Point]]:
    return [
        [Point(10 * (i + 1), 10 * (i + 1) * seconds_a_step, x, 0.5, 0.1) for i, x in enumerate(run)]
        for run in psnrs
    ]


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    slow = Entry("published", 30)
    lines = table({slow: runs([[10, 12, 14], [12, 14, 16]], 2.0)}).splitlines()
    assert lines[0].startswith("| recipe | step | seconds | PSNR, dB |")
    assert lines[-1] == "| published | 30 | 60 | 15.00 ± 1.41 | 0.500 ± 0.000 | 0.100 ± 0.000 |"
    single = {slow: [[Point(5, 1.0, 20.0, 0.5, math.nan)]]}
    assert table(single).splitlines()[-1] == "| published | 5 | 1 | 20.00 | 0.500 |  |"


def test_sooner_says_by_when_the_slow_ones_goal_was_reached() -> None:
    slow, fast = Entry("published", 40), Entry("ours", 20)
    points = {slow: runs([[10, 11, 12, 13]], 1.0), fast: runs([[12.5, 15]], 1.5)}
    assert sooner(points, slow, fast) == (
        "ours has the last PSNR of published (13.00 dB) by step 20: 0.50 of its steps, "
        "0.75 of its time"
    )
    assert "published does not reach the last PSNR of ours (15.00" in sooner(points, fast, slow)


def test_seconds_are_those_of_training_alone(tmp_path: Path) -> None:
    lines = [
        {"step": 10, "images_seen": 80, "images_per_second": 8.0},
        {"step": 10, "val/psnr": 20.0, "val/ssim": 0.5, "val/p_loss": 0.3},
        {"step": 20, "images_seen": 160, "images_per_second": 16.0},
        {"step": 20, "val/psnr": 21.0, "val/ssim": 0.6},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    first, second = _read_points(tmp_path)
    assert first == Point(10, 10.0, 20.0, 0.5, 0.3)
    assert (second.step, second.seconds, second.psnr) == (20, 15.0, 21.0)
    assert math.isnan(second.perceptual)
