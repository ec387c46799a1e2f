"""Between latents."""

from __future__ import annotations

import math

import pytest
import torch
from kl_vae.inference.sampling.interpolate import interpolate, lerp, path_point, slerp

START = torch.tensor([2.0, 0.0, 0.0, 0.0]).view(1, 2, 2)
END = torch.tensor([0.0, 4.0, 0.0, 0.0]).view(1, 2, 2)


def test_slerp_goes_along_the_arc_and_its_length_evenly() -> None:
    for t in (0.0, 0.25, 0.5, 1.0):
        angle, length = t * math.pi / 2, 2 + 2 * t
        expected = torch.tensor([length * math.cos(angle), length * math.sin(angle), 0.0, 0.0])
        torch.testing.assert_close(slerp(START, END, t).flatten(), expected)
    assert slerp(START, END, 0.5).dtype == torch.float32


@pytest.mark.parametrize("end", [1.5 * START, -START, START * 0, START * (1 + 1e-7)])
def test_where_there_is_no_one_arc_it_is_the_line(end: torch.Tensor) -> None:
    for t in (0.0, 0.5, 1.0):
        torch.testing.assert_close(slerp(START, end, t), lerp(START, end, t))
        torch.testing.assert_close(slerp(end, START, t), lerp(end, START, t))


def test_a_path_over_three_images_begins_and_ends_each_row_with_one() -> None:
    images = [START, END, START * 3]
    points = [interpolate(images, i, steps=3) for i in range(6)]
    for index, image in ((0, START), (2, END), (3, END), (5, START * 3)):
        torch.testing.assert_close(points[index], image)
    torch.testing.assert_close(points[1], slerp(START, END, 0.5))
    torch.testing.assert_close(interpolate(images, 4, steps=3, linear=True), (END + START * 3) / 2)
    assert path_point(4, 3) == (1, 1, 0.5)
