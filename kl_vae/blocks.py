"""Residual block, normalisation, and resampling by 2.

Shapes: B batch, C channels, H and W height and width, D size of the context vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.runtime.registry import Registry

NORM_GROUPS = 32
NORM_EPS = 1e-6

Norm = Callable[[int], nn.Module]

NORMALIZATION = Registry("norm_type")
BLOCKS = Registry("block_type")
register_normalization = NORMALIZATION.register
register_block = BLOCKS.register


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018) that runs in float32 or float64 under autocast, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        x = at_least_float32(x)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@register_normalization("group")
def Normalize(channels: int, groups: int = NORM_GROUPS) -> nn.GroupNorm:  # noqa: N802 - published
    """Build a group norm, by default with 32 groups as in the published first stages."""
    return GroupNorm(groups, channels, eps=NORM_EPS)


@register_block("resnet")
class ResnetBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions, each after norm and SiLU, and a shortcut.

    [B, in_channels, H, W] -> [B, out_channels, H, W]. With `context_channels` D > 0, a linear
    projection of the context [B, D] is added between the convolutions, where the published block
    adds its time embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        context_channels: int = 0,
        norm: Norm = Normalize,
    ) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if context_channels:
            self.temb_proj = nn.Linear(context_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.has_context = context_channels > 0
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.has_context:
            assert context is not None, "AutoEncoderKL checks the context"
            h = h + self.temb_proj(F.silu(context))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        out: Tensor = (self.nin_shortcut(x) if self.has_shortcut else x) + h
        return out


def zero_residuals(module: nn.Module) -> None:
    """Zero the last convolution of every ResnetBlock in `module`.

    Each block then starts as its shortcut. Goyal et al. (2017, section 5.1) do this with the scale
    of the last norm.
    """
    for block in module.modules():
        if isinstance(block, ResnetBlock):
            for parameter in block.conv2.parameters():
                nn.init.zeros_(parameter)


class Downsample(nn.Module):
    """Downsampling by a convolution of stride 2 or average pooling, to [B, C, H/2, W/2]."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.with_conv = with_conv

    def forward(self, x: Tensor) -> Tensor:
        if not self.with_conv:
            return F.avg_pool2d(x, 2)
        # published padding: one column at the right, one row at the bottom
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest upsampling to [B, C, 2H, 2W], then a convolution if `with_conv`."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.with_conv = with_conv

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x
