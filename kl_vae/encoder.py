"""Encoder of the autoencoder, and modules shared with the decoder.

Shapes: B batch, C channels, H and W image height and width, h = H/f, w = W/f, z latent channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.attention import make_attention
from kl_vae.blocks import BLOCKS, NORMALIZATION, Downsample, Norm, Normalize, zero_residuals
from kl_vae.ddconfig import DDConfig


class Encoder(nn.Module):
    """Encoder from images [B, in_channels, H, W] to moments [B, 2 * z_channels, h, w].

    It takes the complete ddconfig as keyword arguments (see `DDConfig`). Without `double_z`, the
    output has z_channels channels.

    Raises:
        ValueError: the ddconfig has an unknown key, a wrong type or an invalid value.
    """

    def __init__(self, **ddconfig: Any) -> None:
        super().__init__()
        config = DDConfig.from_dict(ddconfig)
        channels = config.ch
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level in range(len(config.ch_mult)):
            self.down.append(DownLevel(channels, level, config))
            channels = config.channels[level]
        self.mid = Middle(channels, config)
        self.norm_out = make_norm(config)(channels)
        moments = 2 * config.z_channels if config.double_z else config.z_channels
        self.conv_out = nn.Conv2d(channels, moments, 3, padding=1)
        if config.zero_init_residual:
            zero_residuals(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h, context)
        h = self.mid(h, context)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if configured.

    [B, in_channels, H, W] -> [B, C, H, W], where C is the number of channels of the level.
    """

    def __init__(self, in_channels: int, level: int, num_blocks: int, config: DDConfig) -> None:
        super().__init__()
        channels = config.channels[level]
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for _ in range(num_blocks):
            self.block.append(make_block(in_channels, channels, config))
            if config.has_attention(level):
                self.attn.append(make_attention(config.attention, channels, make_norm(config)))
            in_channels = channels

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, context)
            if self.attn:
                x = self.attn[i](x)
        return x


class DownLevel(Level):
    """Level of the encoder, followed by Downsample except for the last level."""

    def __init__(self, in_channels: int, level: int, config: DDConfig) -> None:
        super().__init__(in_channels, level, config.num_res_blocks, config)
        self.downsample: nn.Module = nn.Identity()
        if level < len(config.ch_mult) - 1:
            self.downsample = Downsample(config.channels[level], config.resamp_with_conv)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.downsample(super().forward(x, context))
        return out


class Middle(nn.Module):
    """Middle part: residual block, attention, residual block, [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int, config: DDConfig) -> None:
        super().__init__()
        self.block_1 = make_block(channels, channels, config)
        self.attn_1 = make_attention(config.attention, channels, make_norm(config))
        self.block_2 = make_block(channels, channels, config)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x, context)), context)
        return out


def make_norm(config: DDConfig) -> Norm:
    """Return a function that builds the configured norm for a number of channels."""
    if config.norm_type == "group":
        return partial(Normalize, groups=config.norm_groups)
    return NORMALIZATION[config.norm_type]


def make_block(in_channels: int, out_channels: int, config: DDConfig) -> nn.Module:
    """Build the configured residual block, [B, in_channels, H, W] -> [B, out_channels, H, W]."""
    block: nn.Module = BLOCKS[config.block_type](
        in_channels,
        out_channels,
        dropout=config.dropout,
        context_channels=config.context_channels,
        norm=make_norm(config),
    )
    return block
