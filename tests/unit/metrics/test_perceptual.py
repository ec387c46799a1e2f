"""LPIPS as a measure; its values are those of `tests/parity/test_lpips.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from kl_vae.losses.lpips import LPIPS
from kl_vae.metrics.perceptual import load_lpips
from tests.messages import mentions

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Random weights of the smallest network and heads of ones."""
    torch.manual_seed(0)
    features = torchvision.models.squeezenet1_1(weights=None).features.state_dict()
    torch.save(features, tmp_path / "features.pth")
    channels = (64, 128, 256, 384, 384, 512, 512)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    torch.save(heads, tmp_path / "heads.pth")
    return tmp_path / "features.pth", tmp_path / "heads.pth"


def test_one_distance_for_each_image(files: tuple[Path, Path]) -> None:
    distance = load_lpips("squeeze", *files, CPU)
    x, y = 2 * torch.rand(2, 3, 3, 33, 40) - 1
    measured = distance(x, y)
    expected = LPIPS("squeeze", features=files[0], heads=files[1])(x, y).flatten()
    assert measured.shape == (3,)
    torch.testing.assert_close(measured, expected)
    assert distance(x, x).tolist() == [0.0] * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(x, y), measured)


def test_images_that_are_too_small_to_be_seen_have_none(files: tuple[Path, Path]) -> None:
    small = torch.zeros(2, 3, 16, 40)
    assert load_lpips("squeeze", *files, CPU)(small, small).isnan().tolist() == [True, True]


def test_a_missing_file(files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=mentions("heads=none.pth")):
        load_lpips("squeeze", files[0], "none.pth", CPU)
