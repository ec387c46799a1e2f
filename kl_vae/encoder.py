"""From an image to the moments of its posterior.

B batch, C channels, H and W the image's height and width, h = H/f, w = W/f, z latent channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kl_vae.blocks import Downsample, activate, zero_residuals
from kl_vae.ddconfig import DDConfig
from kl_vae.middle import Middle
from kl_vae.parts import Level, Parts, steps_of


class Encoder(nn.Module):
    """Image [B, in_channels, H, W] -> moments [B, 2 * z_channels, h, w].

    Takes the whole ddconfig as keywords (`DDConfig` describes each). Without `double_z` the output
    has z_channels.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible value in the ddconfig.
    """

    activation_checkpointing: str | None = None

    def __init__(self, **ddconfig: Any) -> None:
        super().__init__()
        config = DDConfig.from_dict(ddconfig)
        parts = Parts(config)
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.ch
        for level in range(len(config.ch_mult)):
            self.down.append(DownLevel(channels, level, config, parts))
            channels = config.channels[level]
        self.mid = Middle(channels, parts)
        self.norm_out = parts.norm(channels)
        moments = 2 * config.z_channels if config.double_z else config.z_channels
        self.conv_out = nn.Conv2d(channels, moments, 3, padding=1)
        if config.zero_init_residual:
            zero_residuals(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for step in steps_of(level, context):
                h = step(h)
        h = self.mid(h, context)
        out: Tensor = self.conv_out(activate(h, self.norm_out, self.activation_checkpointing))
        return out


class DownLevel(Level):
    """The residual blocks of one resolution, with attention where configured, then Downsample."""

    def __init__(self, in_channels: int, level: int, config: DDConfig, parts: Parts) -> None:
        super().__init__()
        channels = config.channels[level]
        self.block, self.attn = parts.level(
            in_channels, channels, config.num_res_blocks, config.has_attention(level)
        )
        self.downsample: nn.Module = nn.Identity()
        if level < len(config.ch_mult) - 1:
            self.downsample = Downsample(channels, config.resamp_with_conv)

    @property
    def resample(self) -> nn.Module:
        """The last step."""
        return self.downsample
