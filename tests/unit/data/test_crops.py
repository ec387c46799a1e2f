"""Resizing, cropping and flipping."""

import pytest
import torch

from kl_vae.data import (
    center_crop,
    random_flip,
    random_recolor,
    resize_short_side,
)
from kl_vae.data.transforms import random_place
from tests.messages import mentions

IMAGE = torch.arange(5 * 7, dtype=torch.uint8).view(1, 5, 7)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (100, 200, 50, (50, 100)),
        (200, 100, 50, (100, 50)),
        (30, 30, 64, (64, 64)),
        (100, 333, 10, (10, 33)),
        (100, 335, 10, (10, 34)),  # 33.5
        (101, 1000, 7, (7, 69)),  # 69.3
        (64, 90, 64, (64, 90)),
        (1, 9, 3, (3, 27)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_resized_sizes(
    height: int, width: int, size: int, expected: tuple[int, int], dtype: torch.dtype
) -> None:
    image = resize_short_side(torch.zeros(2, height, width, dtype=dtype), size)
    assert image.shape == (2, *expected)
    assert image.dtype == dtype


def test_resizing_is_antialiased() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(1, 64, 32)  # [1,64,64], columns 0 1 0 1 ...
    small = resize_short_side(stripes, 8)
    assert (small - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_resized_floats_stay_in_range(channels: int) -> None:
    step = torch.cat([torch.zeros(channels, 8, 4), torch.ones(channels, 8, 4)], dim=2)
    large = resize_short_side(step, 64)
    assert (large.min(), large.max()) == (0, 1)
    bytes_ = resize_short_side((step * 255).to(torch.uint8), 64)
    assert (bytes_.float() / 255 - large).abs().max() < 0.01


def test_very_long_images_are_an_error() -> None:
    with pytest.raises(ValueError, match=mentions("20000 x 2", "2560000 x 256", "resize")):
        resize_short_side(torch.zeros(3, 2, 20_000, dtype=torch.uint8), 256)


def test_center_crop() -> None:
    assert torch.equal(center_crop(IMAGE, 3), IMAGE[:, 1:4, 2:5])
    assert torch.equal(center_crop(IMAGE, 4), IMAGE[:, 0:4, 1:5])
    assert torch.equal(center_crop(IMAGE, 5), IMAGE[:, :, 1:6])


def random_crop(image: torch.Tensor, size: int, rng: torch.Generator) -> torch.Tensor:
    rows, columns = random_place(*image.shape[1:], size, rng)
    return image[:, rows, columns]


def test_random_crop_reaches_every_position() -> None:
    rng = generator()
    corners = {int(random_crop(IMAGE, 4, rng)[0, 0, 0]) for _ in range(200)}
    assert corners == {7 * top + left for top in range(2) for left in range(4)}
    crop = random_crop(IMAGE, 4, rng)
    first = int(crop[0, 0, 0])
    assert torch.equal(crop[0], IMAGE[0, first // 7 :, first % 7 :][:4, :4])


def test_random_flip_mirrors_half_of_the_time() -> None:
    rng = generator()
    flips = [not torch.equal(random_flip(IMAGE, rng), IMAGE) for _ in range(1000)]
    assert 430 < sum(flips) < 570
    mirrored = IMAGE[:, :, [6, 5, 4, 3, 2, 1, 0]]
    assert any(torch.equal(random_flip(IMAGE, rng), mirrored) for _ in range(20))


def test_crops_larger_than_the_image_are_an_error() -> None:
    error = mentions("7 x 5", 6, "data.resize", "data.crop")
    with pytest.raises(ValueError, match=error):
        center_crop(IMAGE, 6)
    with pytest.raises(ValueError, match=error):
        random_crop(IMAGE, 6, generator())


@pytest.mark.parametrize("channels", [3, 4, 6])
def test_random_recolor_blends_channels_half_of_the_time(channels: int) -> None:
    levels = torch.linspace(0, 250, channels).round()
    image = levels.to(torch.uint8).view(channels, 1, 1).expand(channels, 2, 2)
    rng = generator()
    recolored = torch.stack([random_recolor(image, rng)[:, 0, 0] for _ in range(1000)])
    assert recolored.dtype == torch.uint8
    changed = (recolored != image[:, 0, 0]).any(dim=1).sum()
    assert 330 < changed < 570  # one permutation in six or more is none
    # a blend of permutations: the sum of the colours stays, and each lies between the extremes
    colors = 3 if channels == 4 else channels
    sums = recolored[:, :colors].float().sum(dim=1)
    assert (sums - levels[:colors].sum()).abs().max() <= colors
    assert len(recolored.unique(dim=0)) > 300  # any share, not a few permutations
    if channels == 4:
        assert (recolored[:, 3] == 250).all()  # alpha stays
    floats = random_recolor(image / 250, generator(3))
    assert floats.dtype == torch.float32
