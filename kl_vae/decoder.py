"""From latents to an image.

B batch, z latent channels, h and w the latents' height and width, H = f h and W = f w the image's.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.blocks import Upsample, zero_residuals
from kl_vae.ddconfig import DDConfig
from kl_vae.encoder import Level, Middle, make_norm


class Decoder(nn.Module):
    """Latents [B, z_channels, h, w] -> image [B, out_ch, H, W].

    Takes the whole ddconfig as keywords (`DDConfig` describes each). With `give_pre_end` the output
    is the features [B, ch * ch_mult[0], H, W] before the last norm.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible value in the ddconfig.
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
        # stored as published: up.0 is the full resolution, which comes last
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
    """A level of the decoder, with one block more, and after it Upsample, but for the last one."""

    def __init__(self, in_channels: int, level: int, config: DDConfig) -> None:
        super().__init__(in_channels, level, config.num_res_blocks + 1, config)
        self.upsample: nn.Module = nn.Identity()
        if level > 0:
            self.upsample = Upsample(config.channels[level], config.resamp_with_conv)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.upsample(super().forward(x, context))
        return out
