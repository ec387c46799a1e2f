"""Training and encoding from tar shards, as from the folder that was packed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kl_vae.cli.main import main
from tests.messages import is_about
from tests.processes import assert_same, checkpoint, status
from tests.shards import write_shard


@pytest.fixture
def shards(project: Path) -> Path:
    """The images of the project in three shards."""
    images = sorted((project / "images").iterdir())
    for number in range(3):
        part = images[8 * number : 8 * (number + 1)]
        content = {path.name: path.read_bytes() for path in part}
        write_shard(project / "shards" / f"train-{number}.tar", content)
    return project / "shards"


def train(*arguments: str) -> int:
    return main(["train", "tiny.yaml", *arguments])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_run_over_shards_resumes_bit_for_bit_and_equals_that_over_the_folder(
    shards: Path,
) -> None:
    root, each = "data.train.root=shards/train-{0..2}.tar", "training.validate_every_steps=1"
    assert train("--run-dir", "folder", each) == 0
    parts = [root, each, "training.max_steps=3", "data.num_workers=1"]
    assert train("--run-dir", "parts", *parts) == 0
    # the first version wrote a key that has gone, and took it on the command line
    config = Path("parts/config.yaml")
    config.write_text(config.read_text().replace("\ndata:\n", "\ndata:\n  listing_cache: true\n"))
    assert "listing_cache" in config.read_text()
    parts = ["data.train.root=shards", each, "data.listing_cache=false"]
    assert train("--run-dir", "parts", *parts) == 0
    assert status("parts")["state"] == "finished"
    of_folder, of_shards = checkpoint("folder", 6), checkpoint("parts", 6)
    assert of_folder["data_fingerprint"] == of_shards["data_fingerprint"]
    assert_same(of_folder, of_shards)


def test_a_damaged_image_is_named_and_another_takes_its_place(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(shards / "train-3.tar", {"x.png": b"damaged"})
    arguments = ["data.train.root=shards", "data.max_bad_fraction=1", "data.validation.fraction=0"]
    assert train("--run-dir", "run", *arguments, "model.params.monitor=null") == 0
    assert any(is_about(text, "shards/train-3.tar/x.png", "PNG") for text in caplog.messages)


def test_shards_that_cannot_be_used(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(shards / "train-1.tar", "r+b") as file:
        file.truncate(3000)
    assert train("--run-dir", "run", "data.train.root=shards") == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert is_about(last_line, "error:", "data.train.root", "shards/train-1.tar", "byte")
    assert not Path("run").exists()
