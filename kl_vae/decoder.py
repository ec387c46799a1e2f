"""Decoder of the autoencoder.

Shapes: B batch, z latent channels, h and w latent height and width, H = f h and W = f w image
height and width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.blocks import Upsample, zero_residuals
from kl_vae.ddconfig import DDConfig
from kl_vae.encoder import Level, Middle, make_norm


class Decoder(nn.Module):
    """Decoder from latents [B, z_channels, h, w] to images [B, out_ch, H, W].

    It takes the complete ddconfig as keyword arguments (see `DDConfig`). With `give_pre_end`, it
    returns the features [B, ch * ch_mult[0], H, W] before the last norm.

    Raises:
        ValueError: the ddconfig has an unknown key, a wrong type or an invalid value.
    """

    def __init__(self, **ddconfig: Any) -> None:
        super().__init__()
        config = DDConfig.from_dict(ddconfig)
        channels = config.channels[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config)
        levels: list[UpLevel] = []
        for level in reversed(range(len(config.ch_mult))):
            levels.append(UpLevel(channels, level, config))
            channels = config.channels[level]
        # stored in the published order: up.0 has full resolution, and runs last
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = make_norm(config)(channels)
        self.conv_out = nn.Conv2d(channels, config.out_ch, 3, padding=1)
        self.give_pre_end = config.give_pre_end
        self.tanh_out = config.tanh_out
        if config.zero_init_residual:
            zero_residuals(self)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        h: Tensor = self.mid(self.conv_in(z), context)
        for level in reversed(self.up):
            h = level(h, context)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))
        return h.tanh() if self.tanh_out else h


class UpLevel(Level):
    """Level of the decoder: num_res_blocks + 1 blocks, then Upsample unless at full resolution."""

    def __init__(self, in_channels: int, level: int, config: DDConfig) -> None:
        super().__init__(in_channels, level, config.num_res_blocks + 1, config)
        self.upsample: nn.Module = nn.Identity()
        if level > 0:
            self.upsample = Upsample(config.channels[level], config.resamp_with_conv)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.upsample(super().forward(x, context))
        return out
