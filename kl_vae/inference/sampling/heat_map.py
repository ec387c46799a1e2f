"""Numbers as colours."""

from __future__ import annotations

import torch
from torch import Tensor

# sRGB at equal distances from 0 to 1: black, violet, magenta, orange, yellow, white. Their CIE L*
# (0, 20, 40, 60, 80, 100) grows evenly, so that equal differences look equal, in print as well.
ANCHORS = ((0, 0, 0), (72, 20, 118), (172, 38, 92), (232, 102, 30), (248, 188, 52), (255, 255, 255))

_GAINS = (1, 2, 5)  # times a power of ten


def heat_map(values: Tensor) -> Tensor:
    """Values [H, W], of which 0 is black and 1 and more are white, as a picture uint8 [3, H, W]."""
    anchors = torch.tensor(ANCHORS, dtype=torch.float32)
    last = len(anchors) - 1
    place = values.float().clamp(0.0, 1.0) * last
    below = place.long().clamp(max=last - 1)
    share = (place - below)[..., None]
    colors = torch.lerp(anchors[below], anchors[below + 1], share)  # [H, W, 3]
    return colors.round().to(torch.uint8).permute(2, 0, 1)


def gain_for(largest: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... by which `largest` does not exceed 1; at least 1."""
    gain = 1.0
    for exponent in range(12):
        for factor in _GAINS:
            candidate = float(factor * 10**exponent)
            if largest * candidate <= 1.0:
                gain = candidate
    return gain
