"""The residual block without the maps between its layers, on CPUs in float32 without gradients.

Winograd's convolution takes a few rows of its input at a time. Norm and SiLU are done with these
rows, and the shortcut is added to the rows that come out, while they are in the cache: of the
block's maps only its input, what is between its convolutions, and its output ever exist.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from kl_vae.accel.group_norm import scale_and_shift
from kl_vae.accel.hooks import has_hooks
from kl_vae.accel.winograd import winograd_convolve
from kl_vae.accel.winograd_conv import is_3_by_3, suits
from kl_vae.blocks import GroupNorm, ResnetBlock


class FusedResnetBlock(ResnetBlock):
    """A `ResnetBlock` that is computed so where that is possible, and else as it is.

    Only the class tells it from a `ResnetBlock`: `block.__class__` is set, and the parameters stay.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        norm1, conv1, norm2, conv2 = self.norm1, self.conv1, self.norm2, self.conv2
        drops = self.dropout.training and self.dropout.p > 0.0
        if (
            self.has_context
            or drops
            or not (is_group_norm(norm1) and is_group_norm(norm2))
            or not (is_3_by_3(conv1) and is_3_by_3(conv2))
            or not (suits(x, conv1.weight) and suits(x, conv2.weight))
            or any(map(has_hooks, (norm1, conv1, norm2, self.dropout, conv2)))
        ):
            return super().forward(x, context)
        h = winograd_convolve(x, conv1.weight, conv1.bias, activation=scale_and_shift(norm1, x))
        return winograd_convolve(
            h,
            conv2.weight,
            conv2.bias,
            activation=scale_and_shift(norm2, h),
            residual=self.nin_shortcut(x) if self.has_shortcut else x,
            overwrite=self.has_shortcut,
        )


def is_group_norm(norm: nn.Module) -> TypeGuard[nn.GroupNorm]:
    """Whether `norm` computes a group norm, and only that."""
    return type(norm) in (GroupNorm, nn.GroupNorm)
