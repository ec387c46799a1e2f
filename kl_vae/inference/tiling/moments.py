"""Group norms over a map that is only ever seen strip by strip.

B batch, C channels, G groups, S strips, n positions of a strip.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Moments:
    """Mean and squared deviation of each channel, strip by strip, merged exactly.

    Strips are merged in float64 by the formula of Chan et al. (1979), "Updating formulae and a
    pairwise algorithm for computing sample variances", equation 2.1: the mean is never subtracted
    from a sum of squares, which would lose what a small variance has left.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._means: list[Tensor] = []
        self._deviations: list[Tensor] = []

    def add(self, strip: Tensor) -> None:
        """Count a strip [B, C, h, w]."""
        x = _at_least_float32(strip).flatten(2)
        mean = x.mean(2, keepdim=True)
        self._numbers.append(x.shape[2])
        self._means.append(mean[:, :, 0])
        # several times as fast as torch.var_mean on the CPU
        self._deviations.append(torch.linalg.vector_norm(x - mean, dim=2))

    def normalization(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        """What `norm` does with the whole map, as a function of a strip of it."""
        assert isinstance(norm, nn.GroupNorm), "check_exact"
        mean, var = self._of_groups(norm.num_groups)  # each [B, G]
        each = norm.num_channels // norm.num_groups
        device, dtype = self._means[0].device, self._means[0].dtype
        scale = (var + norm.eps).rsqrt().repeat_interleave(each, 1)  # [B, C]
        shift = -mean.repeat_interleave(each, 1) * scale
        if norm.affine:
            weight, bias = (p.detach().cpu().double() for p in (norm.weight, norm.bias))
            scale, shift = weight * scale, weight * shift + bias
        scale, shift = (x[:, :, None, None].to(dtype).to(device) for x in (scale, shift))

        def normalize(strip: Tensor) -> Tensor:
            # of half precision as well, since scale and shift are float32
            out = (strip * scale).add_(shift)
            if torch.is_autocast_enabled(strip.device.type):
                return out
            return out.to(strip.dtype)

        return normalize

    def _of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        # [S, B, C], on the CPU: not every device has float64
        means, deviations = (torch.stack(x).cpu().double() for x in (self._means, self._deviations))
        numbers = torch.tensor(self._numbers, dtype=torch.float64)[:, None, None]
        numbers = numbers.expand_as(means)

        def grouped(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], groups, -1)  # [S, B, G, C / G]

        weights = grouped(numbers)
        total = weights.sum((0, 3), keepdim=True)
        mean = (weights * grouped(means)).sum((0, 3), keepdim=True) / total
        between = weights * (grouped(means) - mean).square()
        within = grouped(deviations).square()
        var = (within + between).sum((0, 3), keepdim=True) / total
        return mean[0, :, :, 0], var[0, :, :, 0]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
