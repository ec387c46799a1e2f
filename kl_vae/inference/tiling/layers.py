"""The model's layers over maps that are held in strips: what comes out is what the whole map gives.

Nothing is computed twice: a convolution takes one line from either neighbour, a group norm the
moments of the whole map, an attention the keys and values of all positions. B batch, C channels,
N positions of a map, n of a strip.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.attention import VanillaAttention, as_sequence
from kl_vae.blocks import Downsample, ResnetBlock, Upsample
from kl_vae.inference.tiling.strips import FeatureMap, Strips, regroup, split, with_halo

# of scores of one chunk of queries, on devices whose attention writes them down
SCORE_BYTES = 256 * 2**20


def convolve(conv: nn.Conv2d, strips: Strips, dim: int) -> Strips:
    """A 3 x 3 convolution of stride 1 over a stream.

    By torch's own kernel whatever the module has: others would transform the weight for each strip.
    """
    padding = (0, 1) if dim == 2 else (1, 0)
    weight = conv.weight
    if weight.device.type == "cpu":
        weight = weight.contiguous()  # a strip's layout follows it, and moments want this one
    return (F.conv2d(strip, weight, conv.bias, padding=padding) for strip in with_halo(strips, dim))


def activated(x: FeatureMap, norm: nn.Module, source: Strips | None = None) -> Strips:
    """Stream silu(norm(x)), from `source` (the strips of x); None: x is drained."""
    normalize = x.moments.normalization(norm)
    for strip in x.drain() if source is None else source:
        yield F.silu(normalize(strip), inplace=True)


def resnet_block(block: nn.Module, x: FeatureMap) -> FeatureMap:
    """As `ResnetBlock`. x is taken apart: of it and the map within, no strip is held in vain."""
    assert isinstance(block, ResnetBlock), "check_exact"
    shortcut: Callable[[Tensor], Tensor] = block.nin_shortcut if block.has_shortcut else _itself
    first = activated(x, block.norm1, x.replace(shortcut))
    h = FeatureMap.collect(convolve(block.conv1, first, x.dim), x.dim)
    second = (block.dropout(strip) for strip in activated(h, block.norm2))
    convolved = convolve(block.conv2, second, x.dim)
    return FeatureMap.collect(map(_sum, x.drain(), convolved), x.dim)


def attention(module: nn.Module, x: FeatureMap) -> FeatureMap:
    """Any attention over a map; one that is not known is applied to the whole of it. x is taken."""
    if isinstance(module, nn.Identity):
        return x
    if type(module) is VanillaAttention:
        return _vanilla_attention(module, x)
    lines = x.strips[0].shape[x.dim]
    return FeatureMap.collect(split(module(x.whole()), x.dim, lines), x.dim)


def downsample(module: Downsample, x: FeatureMap, lines: int) -> FeatureMap:
    """As `Downsample`, to strips of so many lines. x is taken, of strips with even lines."""
    if module.with_conv:
        across = (0, 1, 0, 0) if x.dim == 2 else (0, 0, 0, 1)  # the right, or the bottom
        halved = (
            module.conv(F.pad(strip, across)) for strip in with_halo(x.drain(), x.dim, before=False)
        )
    else:
        halved = (F.avg_pool2d(strip, 2) for strip in x.drain())
    return FeatureMap.collect(regroup(halved, x.dim, lines), x.dim)


def upsample(module: Upsample, x: FeatureMap, lines: int) -> FeatureMap:
    """As `Upsample`, to strips of so many lines, an even number. x is taken."""
    doubled: Strips = (
        F.interpolate(strip, scale_factor=2.0, mode="nearest")
        for strip in regroup(x.drain(), x.dim, lines // 2)
    )
    if module.with_conv:
        doubled = convolve(module.conv, doubled, x.dim)
    return FeatureMap.collect(doubled, x.dim)


def _vanilla_attention(module: VanillaAttention, x: FeatureMap) -> FeatureMap:
    normalize = x.moments.normalization(module.norm)
    keys, values = [], []
    for h in map(normalize, x.strips):
        keys.append(as_sequence(module.k(h)))
        values.append(as_sequence(module.v(h)))
    # [B, 1, N, C] each; the order of the positions is that of the strips
    k, v = (torch.cat(parts, 2).contiguous() for parts in (keys, values))
    del keys, values

    def attended(strip: Tensor) -> Tensor:
        h = normalize(strip)
        q = as_sequence(module.q(h)).contiguous()  # [B, 1, n, C]
        out = torch.cat([F.scaled_dot_product_attention(some, k, v) for some in chunks(q, k)], 2)
        projected: Tensor = module.proj_out(out[:, 0].transpose(1, 2).reshape(h.shape))
        return _sum(strip, projected)

    return FeatureMap.collect(map(attended, x.drain()), x.dim)


def chunks(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Queries [B, 1, n, C] in chunks whose scores over all keys stay within SCORE_BYTES."""
    scores = k.shape[0] * k.shape[2] * k.element_size()  # of one query
    return torch.split(q, max(1, SCORE_BYTES // scores), 2)


def _sum(strip: Tensor, increment: Tensor) -> Tensor:
    # in place, so that what lives long stays where it is: holes between are memory lost
    return strip.add_(increment) if strip.dtype == increment.dtype else strip + increment


def _itself(strip: Tensor) -> Tensor:
    return strip
