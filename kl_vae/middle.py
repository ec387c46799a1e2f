"""The middle of encoder and decoder: residual block, attention, residual block."""

from __future__ import annotations

from torch import Tensor, nn

from kl_vae.parts import Parts


class Middle(nn.Module):
    """[B, C, h, w] -> [B, C, h, w] at the lowest resolution."""

    def __init__(self, channels: int, parts: Parts) -> None:
        super().__init__()
        self.block_1 = parts.block(channels, channels)
        self.attn_1 = parts.attention(channels)
        self.block_2 = parts.block(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x, context)), context)
        return out
