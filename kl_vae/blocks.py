"""The residual block, its normalisation, and resampling by 2.

B batch, C channels, H and W height and width, D size of the context vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kl_vae.accel import group_norm, recompute
from kl_vae.accel.hooks import has_hooks
from kl_vae.accel.norm_silu import norm_silu
from kl_vae.accel.upsample import merging_pays, upsample_and_convolve
from kl_vae.accel.winograd_conv import is_3_by_3
from kl_vae.runtime.registry import Registry

NORM_GROUPS = 32

Norm = Callable[[int], nn.Module]

# What the backward pass computes again. none: nothing but what lies between a norm and its SiLU;
# norms: also what lies between the SiLU and its convolution; blocks: whole residual blocks. Where
# nothing is chosen (None) autograd keeps all of it, and torch.func can differentiate as it likes.
ACTIVATION_CHECKPOINTING = ("none", "norms", "blocks")

NORMALIZATION = Registry("norm_type")
BLOCKS = Registry("block_type")
register_normalization = NORMALIZATION.register
register_block = BLOCKS.register


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018) that autocast leaves in float32, on the CPU as on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return group_norm.normalize(self, x) if group_norm.suits(x) else super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


@register_normalization("group")
def Normalize(channels: int, groups: int = NORM_GROUPS) -> nn.GroupNorm:  # noqa: N802 - published
    """Group norm over 32 groups, as in every published first stage, or another number."""
    return GroupNorm(groups, channels, eps=1e-6)


@register_block("resnet")
class ResnetBlock(nn.Module):
    """Two 3 x 3 convolutions, each after norm and SiLU, added to a shortcut.

    [B, in_channels, H, W] -> [B, out_channels, H, W]. With `context_channels` D > 0 a linear
    projection of the context [B, D] is added between the convolutions (where the published block
    adds its time embedding).

    `activation_checkpointing` says what the backward pass computes again instead of keeping it.
    """

    activation_checkpointing: str | None = None

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
        if self.activation_checkpointing != "blocks" or not torch.is_grad_enabled():
            return self._forward(x, context)
        # without dropout no state of the generators need be kept
        out: Tensor = checkpoint(
            self._forward, x, context, use_reentrant=False, preserve_rng_state=self._draws
        )
        return out

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self._activated_conv(x, self.norm1, self.conv1)
        if self.has_context:
            assert context is not None, "AutoEncoderKL checks the context"
            h = h + self.temb_proj(F.silu(context))[:, :, None, None]
        shortcut = self.nin_shortcut(x) if self.has_shortcut else x
        if not self._draws:
            return self._activated_conv(h, self.norm2, self.conv2, shortcut)
        active = activate(h, self.norm2, self.activation_checkpointing)
        out: Tensor = shortcut + self.conv2(self.dropout(active))
        return out

    @property
    def _draws(self) -> bool:
        """Whether dropout changes anything now."""
        return self.training and bool(getattr(self.dropout, "p", True))

    def _activated_conv(
        self, x: Tensor, norm: nn.Module, conv: nn.Conv2d, residual: Tensor | None = None
    ) -> Tensor:
        """conv(silu(norm(x))) + residual."""
        if (
            self.activation_checkpointing in ("norms", "blocks")
            and recompute.is_possible(x, norm, GroupNorm)
            and recompute.takes_conv(conv)
        ):
            assert isinstance(norm, GroupNorm)
            return recompute.norm_silu_conv(x, norm, conv, residual)
        out: Tensor = conv(activate(x, norm, self.activation_checkpointing))
        return out if residual is None else residual + out


def activate(x: Tensor, norm: nn.Module, activation_checkpointing: str | None) -> Tensor:
    """silu(norm(x)); with activation checkpointing chosen x alone is kept for the backward."""
    if activation_checkpointing is not None and recompute.is_possible(x, norm, GroupNorm):
        assert isinstance(norm, GroupNorm)
        return recompute.norm_silu(x, norm)
    return norm_silu(x, norm)


def zero_residuals(module: nn.Module) -> None:
    """Let every ResnetBlock in `module` begin as its shortcut: its last convolution is 0.

    Goyal et al. (2017, section 5.1) begin so with the last norm's scale.
    """
    for block in module.modules():
        if isinstance(block, ResnetBlock):
            nn.init.zeros_(block.conv2.weight)
            assert block.conv2.bias is not None
            nn.init.zeros_(block.conv2.bias)


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]: a convolution of stride 2, or average pooling."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.with_conv = with_conv

    def forward(self, x: Tensor) -> Tensor:
        if not self.with_conv:
            return F.avg_pool2d(x, 2)
        # the published padding: one column at the right, one row at the bottom
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2H, 2W]: nearest, then a convolution if `with_conv`.

    Both are computed as one (`kl_vae.accel.upsample`) as `merges` says: None, where that was
    measured to be faster; False, never; True, wherever it is possible.
    """

    merges: bool | None = None

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.with_conv = with_conv

    def forward(self, x: Tensor) -> Tensor:
        if self.is_merged(x):
            return upsample_and_convolve(self.conv, x)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x

    def is_merged(self, x: Tensor) -> bool:
        """Whether x is upsampled and convolved as one."""
        if not self.with_conv or not is_3_by_3(self.conv) or has_hooks(self.conv):
            return False
        return merging_pays(x, self.conv) if self.merges is None else self.merges
