"""From latents to an image.

B batch, z latent channels, h and w the latents' height and width, H = f h and W = f w the image's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kl_vae.blocks import Upsample, activate, zero_residuals
from kl_vae.ddconfig import DDConfig
from kl_vae.middle import Middle
from kl_vae.parts import Level, Parts, steps_of


class Decoder(nn.Module):
    """Latents [B, z_channels, h, w] -> image [B, out_ch, H, W].

    Takes the whole ddconfig as keywords (`DDConfig` describes each). With `give_pre_end` the output
    is the features [B, ch * ch_mult[0], H, W] before the last norm.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible value in the ddconfig.
    """

    activation_checkpointing: str | None = None

    def __init__(self, **ddconfig: Any) -> None:
        super().__init__()
        config = DDConfig.from_dict(ddconfig)
        parts = Parts(config)
        channels = config.channels[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, parts)
        levels: list[UpLevel] = []
        for level in reversed(range(len(config.ch_mult))):
            levels.append(UpLevel(channels, level, config, parts))
            channels = config.channels[level]
        # stored as published: up.0 is the full resolution, which comes last
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = parts.norm(channels)
        self.conv_out = nn.Conv2d(channels, config.out_ch, 3, padding=1)
        self.give_pre_end = config.give_pre_end
        self.tanh_out = config.tanh_out
        if config.zero_init_residual:
            zero_residuals(self)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        h: Tensor = self.conv_in(z)
        h = self.mid(h, context)
        for level in reversed(self.up):
            for step in steps_of(level, context):
                h = step(h)
        if self.give_pre_end:
            return h
        # the last convolution stays apart: a GAN asks for the gradient of its weight alone
        h = self.conv_out(activate(h, self.norm_out, self.activation_checkpointing))
        return h.tanh() if self.tanh_out else h


class UpLevel(Level):
    """The residual blocks of one resolution, with attention where configured, then Upsample."""

    def __init__(self, in_channels: int, level: int, config: DDConfig, parts: Parts) -> None:
        super().__init__()
        channels = config.channels[level]
        self.block, self.attn = parts.level(
            in_channels, channels, config.num_res_blocks + 1, config.has_attention(level)
        )
        self.upsample: nn.Module = nn.Identity()
        if level > 0:
            self.upsample = Upsample(channels, config.resamp_with_conv)

    @property
    def resample(self) -> nn.Module:
        """The last step."""
        return self.upsample
