"""The list of images that could not be used."""

from pathlib import Path

import pytest
import torch

from kl_vae.data import BadImage
from kl_vae.runtime.distributed import Ranks
from kl_vae.training.guards import BadImages

RANKS = Ranks(0, 1, torch.device("cpu"))


def test_each_is_listed_once_also_by_a_run_that_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = BadImage("a.png", "truncated"), BadImage("b: c.png", "not an image: no")
    bad_images = BadImages(tmp_path, RANKS, number=300, max_fraction=0.01)
    bad_images.note([a, a])
    bad_images.note([a])
    again = BadImages(tmp_path, RANKS, number=300, max_fraction=0.01)
    again.note([b, a])
    listed = (tmp_path / "bad_images.txt").read_text()
    assert listed == "a.png\ttruncated\nb: c.png\tnot an image: no\n"
    assert caplog.messages == [
        "an image cannot be used: a.png: truncated",
        "an image cannot be used: b: c.png: not an image: no",
    ]


def test_more_than_the_bound_are_too_many(tmp_path: Path) -> None:
    bad_images = BadImages(tmp_path, RANKS, number=200, max_fraction=0.01)
    assert not bad_images.too_many
    bad_images.note([BadImage("a", "x"), BadImage("b", "x")])
    assert not bad_images.too_many  # 1 % may be
    bad_images.note([BadImage("c", "x")])
    assert bad_images.too_many
    assert BadImages(tmp_path, RANKS, number=200, max_fraction=0.01).too_many
    assert str(bad_images.error()) == (
        "3 of 200 images cannot be used, more than data.max_bad_fraction=0.01 "
        f"({tmp_path}/bad_images.txt lists them): raise it to go on without them, or mend them and "
        "start in a new --run-dir"
    )


def test_a_list_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad_images = BadImages(tmp_path / "gone", RANKS, number=200, max_fraction=0.01)
    bad_images.note([BadImage("a.png", "truncated")])
    assert "bad_images.txt cannot be written (No such file or directory)" in caplog.text
