"""Numbers as colours."""

from __future__ import annotations

import pytest
import torch
from kl_vae.inference.sampling.heat_map import ANCHORS, gain_for, heat_map


def test_colours_from_black_over_the_anchors_to_white() -> None:
    values = torch.tensor([[-1.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 7.0]])
    picture = heat_map(values)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 1, 8)
    expected = [ANCHORS[0], *ANCHORS, ANCHORS[-1]]
    assert [tuple(color) for color in picture[:, 0].T.tolist()] == expected


def test_more_is_always_lighter() -> None:
    picture = heat_map(torch.linspace(0.0, 1.0, 200)[None]).float()[:, 0] / 255.0
    linear = torch.where(picture <= 0.04045, picture / 12.92, ((picture + 0.055) / 1.055) ** 2.4)
    luminance = torch.tensor([0.2126, 0.7152, 0.0722]) @ linear
    assert (luminance.diff() >= -1e-3).all()
    # CIE L* of the anchors: equally far apart
    dark = luminance < 0.008856
    lightness = torch.where(dark, 903.3 * luminance, 116.0 * luminance ** (1 / 3) - 16.0)
    near = torch.linspace(0.0, 100.0, 200)
    assert (lightness - near).abs().max() < 5.0


@pytest.mark.parametrize(
    ("largest", "gain"), [(0.3, 2.0), (0.5, 2.0), (0.04, 20.0), (0.0101, 50.0), (1.7, 1.0)]
)
def test_gains_are_round(largest: float, gain: float) -> None:
    assert gain_for(largest) == gain


def test_the_gain_of_nothing_is_finite() -> None:
    assert gain_for(0.0) == 5e11
