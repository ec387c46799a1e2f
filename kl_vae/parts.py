"""The constructors that a DDConfig selects by name."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from kl_vae.attention import make_attention
from kl_vae.blocks import BLOCKS, NORM_GROUPS, NORMALIZATION, Norm, Normalize
from kl_vae.ddconfig import DDConfig


class Parts:
    """Constructors of norm, residual block and attention, with what all instances share filled in.

    `norm(channels)`, `block(in_channels, out_channels)`, `attention(channels)`, and `level` for the
    blocks of one resolution.
    """

    def __init__(self, config: DDConfig) -> None:
        self.norm: Norm = NORMALIZATION[config.norm_type]
        if config.norm_type == "group" and config.norm_groups != NORM_GROUPS:
            self.norm = partial(Normalize, groups=config.norm_groups)
        self.block = partial(
            BLOCKS[config.block_type],
            dropout=config.dropout,
            context_channels=config.context_channels,
            norm=self.norm,
        )
        self.attention = partial(make_attention, config.attention, norm=self.norm)

    def level(
        self, in_channels: int, channels: int, number: int, has_attention: bool
    ) -> tuple[nn.ModuleList, nn.ModuleList]:
        """The residual blocks of one resolution, and an attention for each of them or none."""
        blocks, attentions = nn.ModuleList(), nn.ModuleList()
        for _ in range(number):
            blocks.append(self.block(in_channels, channels))
            if has_attention:
                attentions.append(self.attention(channels))
            in_channels = channels
        return blocks, attentions


def apply_level(
    blocks: nn.ModuleList, attentions: nn.ModuleList, x: Tensor, context: Tensor | None
) -> Tensor:
    """Pass [B, C, H, W] through what `Parts.level` gives, each block followed by its attention."""
    for i, block in enumerate(blocks):
        x = block(x, context)
        if attentions:
            x = attentions[i](x)
    return x
