"""Encoder and decoder that free each feature map as soon as possible.

The input of a module stays alive until its call returns, so the input of a level would outlive its
first block. Without gradients, the layers of a level are therefore called directly from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from kl_vae.accel.resnet_block import activate
from kl_vae.accel.swap import is_own, is_traced, is_untouched
from kl_vae.decoder import Decoder, UpLevel
from kl_vae.encoder import DownLevel, Encoder, Level


class FastEncoder(Encoder):
    """`Encoder` that frees feature maps early; its blocks share its `activation_checkpointing`."""

    activation_checkpointing: str | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if not is_own(self, FastEncoder) or is_traced():
            return super().forward(x, context)
        h = self.conv_in(x)
        for layer in layers(self.down, context):
            h = layer(h)
        h = self.mid(h, context)
        out: Tensor = self.conv_out(activate(h, self.norm_out, self.activation_checkpointing))
        return out


class FastDecoder(Decoder):
    """`Decoder` that frees feature maps early; its blocks share its `activation_checkpointing`."""

    activation_checkpointing: str | None = None

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if not is_own(self, FastDecoder) or is_traced():
            return super().forward(z, context)
        h: Tensor = self.mid(self.conv_in(z), context)
        for layer in layers(reversed(self.up), context):
            h = layer(h)
        if self.give_pre_end:
            return h
        # the last convolution is not fused: the adaptive GAN weight needs its weight gradient alone
        h = self.conv_out(activate(h, self.norm_out, self.activation_checkpointing))
        return h.tanh() if self.tanh_out else h


def layers(
    levels: Iterable[nn.Module], context: Tensor | None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the layers of the levels, to be called in order.

    A level is yielded as a whole if gradients are enabled or if it has been modified.
    """
    for level in levels:
        if torch.is_grad_enabled() or not is_untouched(level, DownLevel, UpLevel):
            yield partial(level, context=context)
            continue
        assert isinstance(level, Level)
        for i, block in enumerate(level.block):
            yield partial(block, context=context)
            if level.attn:
                yield level.attn[i]
        if isinstance(level, DownLevel):
            yield level.downsample
        elif isinstance(level, UpLevel):
            yield level.upsample
