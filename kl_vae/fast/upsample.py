"""Nearest upsampling by 2 and the 3 x 3 convolution after it, as one transposed convolution.

B batch, C channels, O channels of the output, H and W height and width.

Along one axis let x be the map, u[j] = x[j // 2] the upsampled one, and w the kernel. The
convolution gives y[j] = w0 u[j - 1] + w1 u[j] + w2 u[j + 1], which is

    y[2i]     = w0 x[i - 1] + (w1 + w2) x[i]
    y[2i + 1] = (w0 + w1) x[i] + w2 x[i + 1].

A transposed convolution with stride 2, padding 1 and the kernel t adds t[k] x[i] to y[2i - 1 + k],
for k from 0 to 3: the same, with t = (w2, w1 + w2, w0 + w1, w0). So in two dimensions 4 instead of
9 multiplications are made for each value of the output, and the upsampled map never exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_and_convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, halo: tuple[int, int] = (0, 0)
) -> Tensor:
    """[B, C, H, W] -> [B, O, 2H, 2W], with the weight [O, C, 3, 3] of a convolution of padding 1.

    Differentiable in x, weight and bias. Up to rounding it is
    `F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)`.

    Args:
        x: the map, or a part of it.
        weight: of the convolution.
        bias: [O] or None.
        halo: lines at either end of H and of W that belong to the parts beside this one: they are
            taken into account, and not upsampled.
    """
    kernel = _spread(_spread(weight, 2), 3).transpose(0, 1)  # [C, O, 4, 4]
    padding = (1 + 2 * halo[0], 1 + 2 * halo[1])
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=padding)


def _spread(weight: Tensor, dim: int) -> Tensor:
    """The 4 taps t of the 3 taps w along `dim`, added in the precision of the weight."""
    first, second, third = weight.unbind(dim)
    return torch.stack((third, second + third, first + second, first), dim)


def merging_pays(x: Tensor) -> bool:
    """Whether that was measured to be faster than both steps."""
    return x.device.type == "cpu"
