"""Images are resized as torchvision resizes them."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from kl_vae.data import resize_short_side


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize(("height", "width", "size"), [(37, 61, 16), (20, 13, 40), (64, 64, 33)])
def test_the_same_values(
    dtype: torch.dtype, channels: int, height: int, width: int, size: int
) -> None:
    # [H, W, C] in memory, as images are decoded
    image = torch.randint(0, 256, (height, width, channels), dtype=torch.uint8).permute(2, 0, 1)
    image = image if dtype == torch.uint8 else image / 255
    ours = resize_short_side(image, size)
    theirs = functional.resize(
        image, list(ours.shape[1:]), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    if dtype == torch.float32:
        theirs = theirs.clamp(0, 1)  # it overshoots
    assert ours.dtype == dtype and min(ours.shape[1:]) == size
    assert torch.equal(ours, theirs)
