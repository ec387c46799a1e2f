"""`kl-vae benchmark data` as a user types it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kl_vae.benchmark.data import DRAFTED, FLOATS, OURS, THEIRS, Feed, table
from kl_vae.cli.main import main
from tests.shards import make_shards

# Python 3.12 warns of every fork in a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def test_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = (
        "--images 8 --size 96 --crop 24 --batch-size 4 --workers 0 1 --repeats 2 --out d.json"
    )
    assert main(["benchmark", "data", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Crops of 24 x 24 in batches of 4, one thread a process, 2 passes of")
    figures = json.loads((tmp_path / "d.json").read_text())
    measured = [(feed["resize"], feed["workers"]) for feed in figures["feeds"]]
    assert measured == [(24, 0), (24, 1), (None, 0), (None, 1)]
    for feed in figures["feeds"]:
        drafted = [DRAFTED] if feed["resize"] else []
        assert list(feed["images_per_second"]) == [THEIRS, OURS, FLOATS, *drafted]
        resize = feed["resize"] or "as they are"
        for name, rates in feed["images_per_second"].items():
            assert len(rates) == 2 and min(rates) > 0
            row = f"| {resize} | {feed['workers']} | {name} | {statistics.median(rates):.0f} |"
            assert row in printed
    psnr = figures["feeds"][0]["draft_psnr"]
    assert psnr > 30
    assert f"\nResized to 24, crops by draft have {psnr:.1f} dB PSNR against" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]  # the pictures are gone


def test_pictures_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "inner" / f"{number}.png")
    arguments = "--folder photos --images 4 --crop 32 --batch-size 2 --workers 0 --repeats 1"
    assert main(["benchmark", "data", *arguments.split()]) == 0
    assert "draft" not in capsys.readouterr().out  # a PNG is decoded whole


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    for number in range(2):
        Image.new("RGB", (40, 30)).save(tmp_path / "few" / f"{number}.png")
    make_shards(tmp_path / "shards", shards=1, images=2)

    def refusal(arguments: str) -> str:
        assert main(["benchmark", "data", "--repeats", "1", *arguments.split()]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("kl-vae benchmark: error: ")

    assert refusal("--folder none") == "--folder none: give a folder of pictures"
    assert refusal("--workers 9999") == "--workers 9999: give no more than there are cores"
    assert refusal("--out no/d.json") == "--out no/d.json: give a file in a folder that exists"
    assert refusal("--folder shards") == (
        "there are tar shards, which ImageFolder cannot read: give pictures"
    )
    assert "40 x 30, smaller than the crop of 32: set data.resize" in refusal(
        "--folder few --crop 32 --resize 0 --batch-size 2"
    )
    assert "fewer images (2) than one global batch (3)" in refusal(
        "--folder few --crop 8 --batch-size 3"
    )


def test_the_ratio_is_the_median_of_those_of_the_rounds() -> None:
    feed = Feed(None, 2, {THEIRS: [100.0, 200.0, 100.0], OURS: [150.0, 220.0, 180.0]})
    assert feed.ratio(OURS) == 1.5 and feed.ratio(THEIRS) == 1.0
    assert table([feed]).splitlines()[2:] == [
        "| as they are | 2 | torchvision | 100 | 100 to 200 | 1.00 |",
        "| as they are | 2 | ours | 180 | 150 to 220 | 1.50 |",
    ]
