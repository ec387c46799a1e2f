"""LPIPS as an evaluation metric.

Shapes: B batch, H and W image height and width.
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
    """Load LPIPS v0.1 (Zhang et al. 2018) as a metric; see `LPIPS`.

    All ranks must call this.

    Args:
        net: `vgg`, `alex` or `squeeze`.
        features: weights file of the network; None: the torchvision weights, downloaded once.
        heads: weights file of the linear heads; None: the published ones, downloaded once.
        device: device for the computation.

    Returns:
        A function that maps x and y, [B, 3, H, W] each in [-1, 1], to their distances [B],
        float32 on `device`; NaN if a side is too small for the network.

    Raises:
        ValueError: `net` is unknown, or a file is missing, cannot be downloaded, or has other
            contents.
    """
    try:
        lpips = LPIPS(net, features=features, heads=heads).to(device)
    except ValueError as error:
        raise ValueError(f"{error} (the arguments are lpips_features and lpips_heads)") from error

    @torch.inference_mode()
    def distances(x: Tensor, y: Tensor) -> Tensor:
        if min(x.shape[2:]) < lpips.network.smallest_side:
            return torch.full(x.shape[:1], math.nan, device=device)
        return lpips(x.to(device), y.to(device)).flatten(1).squeeze(1)  # type: ignore[no-any-return]

    return distances
