"""Attention modules over all positions of a feature map, and their registry.

Shapes: B batch, C channels, H and W height and width, N = H * W positions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, einsum, nn

from kl_vae.blocks import Norm, Normalize
from kl_vae.runtime.registry import Registry

ATTENTION = Registry("attn_type")
register_attention = ATTENTION.register


def make_attention(attn_type: str, channels: int, norm: Norm = Normalize) -> nn.Module:
    """Build the attention module registered as `attn_type`, [B, C, H, W] -> [B, C, H, W].

    Raises:
        ValueError: `attn_type` is unknown.
    """
    attention: nn.Module = ATTENTION[attn_type](channels, norm)
    return attention


@register_attention("vanilla")
class VanillaAttention(nn.Module):
    """Single-head softmax attention over the N positions, with a residual connection."""

    def __init__(self, channels: int, norm: Norm = Normalize) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # contiguous, since PyTorch's memory-efficient CPU kernel does not support transposed inputs
        q, k, v = (as_sequence(f(h)).contiguous() for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))
        return out


def as_sequence(x: Tensor) -> Tensor:
    """View [B, C, H, W] as [B, 1, N, C], with one head."""
    return x.flatten(2).transpose(1, 2)[:, None]


@register_attention("linear")
class LinearAttention(nn.Module):
    """Efficient attention of linear cost (Shen et al. 2018), as published with LDM.

    Keys are normalised over the positions, so that keys and values combine to a C x C matrix. Like
    the published module, it has neither a norm nor a residual connection.
    """

    def __init__(self, channels: int, norm: Norm = Normalize) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).flatten(2).chunk(3, dim=1)  # each [B, C, N]
        context = einsum("bdn,ben->bde", k.softmax(dim=-1), v)
        out: Tensor = self.to_out(einsum("bde,bdn->ben", context, q).reshape(x.shape))
        return out


@register_attention("none")
def no_attention(channels: int, norm: Norm = Normalize) -> nn.Identity:
    """Return an identity module, for no attention."""
    return nn.Identity()
