"""The constructors that a DDConfig selects by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kl_vae.accel.hooks import has_hooks
from kl_vae.attention import make_attention
from kl_vae.blocks import BLOCKS, NORM_GROUPS, NORMALIZATION, Norm, Normalize
from kl_vae.ddconfig import DDConfig

Step = Callable[[Tensor], Tensor]


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


class Level(nn.Module):
    """The residual blocks of one resolution, with attention where configured.

    [B, C, H, W] -> [B, O, H, W], or what `resample` makes of it.
    """

    block: nn.ModuleList
    attn: nn.ModuleList

    @property
    def resample(self) -> nn.Module:
        """What comes after them."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for step in self.steps(context):
            x = step(x)
        return x

    def steps(self, context: Tensor | None) -> list[Step]:
        """What `forward` does one after the other, each block followed by its attention."""
        steps: list[Step] = []
        for i, block in enumerate(self.block):
            steps.append(partial(block, context=context))
            if self.attn:
                steps.append(self.attn[i])
        return [*steps, self.resample]


def steps_of(level: nn.Module, context: Tensor | None) -> list[Step]:
    """What to call one after the other in place of a level, so that no map is held for longer.

    The map that a module is called with is there until the call returns; that of a level would
    outlast its first block. It is the level itself where gradients keep its maps anyway, and where
    it is seen as a whole.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or has_hooks(level)
        or level._compiled_call_impl is not None
    ):
        return [partial(level, context=context)]
    assert isinstance(level, Level)
    return level.steps(context)
