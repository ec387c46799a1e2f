"""The residual block without the maps between its layers, on CPUs in float32 without gradients.

Winograd's convolution takes a few rows of its input at a time. Norm and SiLU are done with these
rows, and the shortcut is added to the rows that come out, while they are in the cache: of the
block's maps only its input, what is between its convolutions, and its output ever exist.
"""

from __future__ import annotations

from torch import Tensor, nn

from kl_vae.blocks import GroupNorm, ResnetBlock
from kl_vae.fast.group_norm import scale_and_shift
from kl_vae.fast.winograd import is_3_by_3, suits, winograd_convolve


class FusedResnetBlock(ResnetBlock):
    """A `ResnetBlock` that is computed so where that is possible, and else as it is.

    Only the class tells it from a `ResnetBlock`: `block.__class__` is set, and the parameters stay.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.has_context or not self._suits(x):
            return super().forward(x, context)
        h = winograd_convolve(
            x, self.conv1.weight, self.conv1.bias, activation=scale_and_shift(self.norm1, x)
        )
        return winograd_convolve(
            h,
            self.conv2.weight,
            self.conv2.bias,
            activation=scale_and_shift(self.norm2, h),
            residual=self.nin_shortcut(x) if self.has_shortcut else x,
        )

    def _suits(self, x: Tensor) -> bool:
        drops = self.dropout.training and self.dropout.p > 0.0
        return (
            suits(x, self.conv1.weight)
            and suits(x, self.conv2.weight)
            and is_group_norm(self.norm1)
            and is_group_norm(self.norm2)
            and is_3_by_3(self.conv1)
            and is_3_by_3(self.conv2)
            and not drops
        )


def is_group_norm(norm: nn.Module) -> bool:
    """Whether `norm` computes a group norm, and only that: no subclass of others, no hooks."""
    hooks = norm._forward_hooks or norm._forward_pre_hooks
    return type(norm) in (GroupNorm, nn.GroupNorm) and not hooks
