"""Nearest upsampling by 2 and the 3 x 3 convolution after it, as one transposed convolution.

Shapes: B batch, C input channels, O output channels, H and W height and width.

Along one axis let x be the feature map, u[j] = x[j // 2] the upsampled one, and w the kernel. The
convolution gives y[j] = w0 u[j - 1] + w1 u[j] + w2 u[j + 1], which is

    y[2i]     = w0 x[i - 1] + (w1 + w2) x[i]
    y[2i + 1] = (w0 + w1) x[i] + w2 x[i + 1].

A transposed convolution with stride 2, padding 1 and the kernel t adds t[k] x[i] to y[2i - 1 + k],
for k from 0 to 3, which is the same for t = (w2, w1 + w2, w0 + w1, w0). In two dimensions this
takes 4 instead of 9 multiplications per output value, and the upsampled feature map is never
stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.convolution import CONVOLUTIONS, WinogradConv2d, is_3_by_3, suits
from kl_vae.accel.swap import is_exporting, is_own, is_untouched
from kl_vae.accel.winograd import UPSAMPLED, winograd_convolve
from kl_vae.blocks import Upsample


class MergedUpsample(Upsample):
    """`Upsample` as a transposed convolution: `always`, or where `merging_pays`.

    Elsewhere it is `upsample_nearest`, then the convolution.
    """

    always: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if not is_own(self, MergedUpsample):
            return super().forward(x)
        if self.with_conv and self._merges(x):
            return upsample_and_convolve(self.conv, x)
        x = upsample_nearest(x)
        return self.conv(x) if self.with_conv else x

    def _merges(self, x: Tensor) -> bool:
        conv = self.conv
        return (
            is_untouched(conv, *CONVOLUTIONS)
            and is_3_by_3(conv)
            and not is_exporting()
            and x.device == conv.weight.device
            and (self.always or merging_pays(conv, x))
        )


def upsample_nearest(x: Tensor) -> Tensor:
    """Repeat each value in a square of 2 x 2, to [B, C, 2H, 2W] in the memory format of x."""
    # Compiled, the backward of interpolate adds atomically, in any order; that of expand is a sum.
    # Eager interpolate adds in a fixed order, on CPUs 2 to 9 times as fast as the sum. Runtimes
    # have a kernel for it, and exported graphs keep it.
    if not torch.compiler.is_compiling() or is_exporting():
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    b, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        copies = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, h, 2, w, 2, c)
        return copies.reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
    return x[..., None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)


def upsample_and_convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Compute `conv(F.interpolate(x, scale_factor=2.0))`: [B, C, H, W] -> [B, O, 2H, 2W].

    The result is exact up to rounding. `conv` must satisfy `is_3_by_3`. A `WinogradConv2d` takes
    even fewer multiplications.
    """
    if isinstance(conv, WinogradConv2d) and suits(conv, x):
        return winograd_convolve(x, conv.weight, conv.bias, transforms=UPSAMPLED)
    return transposed_convolution(x, conv.weight, conv.bias)


def transposed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the transposed convolution; differentiable in x, weight [O, C, 3, 3] and bias [O]."""
    kernel = _spread(_spread(weight, 2), 3).transpose(0, 1)  # [C, O, 4, 4]
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def _spread(weight: Tensor, dim: int) -> Tensor:
    """Return the 4 taps t for the 3 taps w along `dim`, in the precision of the weight."""
    first, second, third = weight.unbind(dim)
    return torch.stack((third, second + third, first + second, first), dim)


def merging_pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether merging is faster in benchmarks of forward plus backward.

    It is not faster in half precision or for small feature maps. The choice does not depend on the
    batch size.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.shape[2] * x.shape[3] >= 2 * conv.out_channels
    )
