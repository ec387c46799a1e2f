"""The perceptual distance LPIPS as a measure.

B batch, H and W the image's height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kl_vae.losses.lpips import LPIPS


def load_lpips(
    net: str,
    features: str | Path | None,
    heads: str | Path | None,
    device: torch.device,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Load LPIPS v0.1 (Zhang et al. 2018) to measure images with; see `LPIPS`.

    Among several ranks all of them call this.

    Args:
        net: `vgg`, `alex` or `squeeze`.
        features: file of the network's weights; None: torchvision's, downloaded once.
        heads: file of the linear heads; None: the published ones, downloaded once.
        device: where it computes.

    Returns:
        A function of x and y, each [B, 3, H, W] in [-1, 1], that gives their distances [B]:
        float32 on `device`, NaN where a side is smaller than the network can see.

    Raises:
        ValueError: an unknown `net`, or a file that is not there, cannot be downloaded, or holds
            something else.
    """
    try:
        lpips = LPIPS(net, features=features, heads=heads).to(device)
    except ValueError as error:
        raise ValueError(f"{error} (here as lpips_features and lpips_heads)") from error

    @torch.inference_mode()
    def distances(x: Tensor, y: Tensor) -> Tensor:
        if min(x.shape[2:]) < lpips.network.smallest_side:
            return torch.full(x.shape[:1], math.nan, device=device)
        return lpips(x.to(device), y.to(device)).flatten(1).squeeze(1)  # type: ignore[no-any-return]

    return distances
