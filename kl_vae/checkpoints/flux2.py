"""What FLUX.2's autoencoder has beyond the CompVis layout.

Its quant convolutions lie in encoder and decoder, and a batch norm over patches of 2 x 2 latents,
never trained further, says how they are normalised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

EPS = 1.0e-4  # of the batch norm
_MOVED = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
_MEAN, _VAR, _COUNT = "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"


def with_quant_convolutions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.2's tensors with the quant convolutions where CompVis has them."""
    return {_moved(key): x for key, x in tensors.items()}


def take_batch_norm(
    tensors: Mapping[str, Tensor], eps: float = EPS
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Split the batch norm off: the other tensors, and it as `model.params.latents`, or None."""
    rest = {key: x for key, x in tensors.items() if key not in (_MEAN, _VAR, _COUNT)}
    channels = _latent_channels(tensors)
    if _MEAN not in tensors or _VAR not in tensors or not channels:
        return rest, None
    mean, var = (tensors[key].double().flatten() for key in (_MEAN, _VAR))
    latents = {
        "mean": tuple(mean.tolist()),
        "std": tuple((var + eps).sqrt().tolist()),
        "patch_size": math.isqrt(mean.numel() // channels),
        "per_channel": True,
    }
    return rest, latents


def batch_norm(latents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the batch norm that normalises as `latents` say."""
    std = torch.tensor(latents["std"], dtype=torch.float64)
    return {
        _MEAN: torch.tensor(latents["mean"], dtype=torch.float64).float(),
        _VAR: (std.square() - EPS).float(),
        _COUNT: torch.tensor(0),
    }


def _latent_channels(tensors: Mapping[str, Tensor]) -> int:
    """Channels of the first convolution that latents go through; 0: there is none."""
    for key in ("post_quant_conv.weight", "decoder.conv_in.weight"):
        if key in tensors:
            return 0 if tensors[key].ndim < 2 else tensors[key].shape[1]
    return 0


def _moved(key: str) -> str:
    for old, new in _MOVED.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
