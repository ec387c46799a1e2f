"""The constructors that a DDConfig selects by name."""

from __future__ import annotations

from functools import partial

from kl_vae.attention import make_attention
from kl_vae.blocks import BLOCKS, NORMALIZATION, Norm
from kl_vae.ddconfig import DDConfig


class Parts:
    """Constructors of norm, residual block and attention, with what all instances share filled in.

    `norm(channels)`, `block(in_channels, out_channels)`, `attention(channels)`.
    """

    def __init__(self, config: DDConfig) -> None:
        self.norm: Norm = NORMALIZATION[config.norm_type]
        self.block = partial(
            BLOCKS[config.block_type],
            dropout=config.dropout,
            context_channels=config.context_channels,
            norm=self.norm,
        )
        self.attention = partial(make_attention, config.attention, norm=self.norm)
