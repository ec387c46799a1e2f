"""Encode and decode in strips, with the result of the whole image.

Each feature map is held in strips along its longer axis, each layer goes over them once, and a
strip is let go as soon as it has been used: about two feature maps exist at a time. Nothing is
computed twice: a convolution takes one line from either neighbour, a group norm the moments of the
whole map, an attention the keys and values of all positions.

B batch, C channels, H and W the image's height and width, h = H/f, w = W/f, z latent channels, N
positions of a map, n of a strip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.convolution import CONVOLUTIONS
from kl_vae.accel.group_norm import NORMS
from kl_vae.accel.resnet_block import FastResnetBlock
from kl_vae.accel.swap import is_untouched
from kl_vae.attention import VanillaAttention, as_sequence
from kl_vae.blocks import Downsample, ResnetBlock, Upsample
from kl_vae.decoder import UpLevel
from kl_vae.encoder import DownLevel, Middle
from kl_vae.inference.tiling.strips import FeatureMap, Strips, regroup, split, with_halo
from kl_vae.model import AutoEncoderKL

# of a strip of the level's widest map in float32; on CPUs strips that stay in the cache are fastest
STRIP_BYTES = {"cpu": 8 * 2**20}
OTHER_STRIP_BYTES = 64 * 2**20
# of scores of one chunk of queries, on devices whose attention writes them down
SCORE_BYTES = 256 * 2**20


def encode_exact(model: AutoEncoderKL, images: Tensor, strip_bytes: int | None = None) -> Tensor:
    """Images [B, C, H, W] -> moments [B, 2z, h, w], as `AutoEncoderKL.encode` computes them.

    Raises:
        ValueError: a part of the model that is not computed in strips.
    """
    check_exact(model)
    encoder, channels = model.encoder, model.config.channels
    cut = _Cut(images, strip_bytes)
    dim = cut.dim
    strips = split(images, dim, cut.lines(max(model.config.ch, channels[0])))
    h = FeatureMap.collect(convolve(encoder.conv_in, strips, dim), dim)
    for level, part in enumerate(encoder.down):
        h = _level(part, h)
        if isinstance(part.downsample, Downsample):
            lines = cut.lines(max(channels[level : level + 2]), -(level + 1))
            h = downsample(part.downsample, h, lines)
    out = convolve(encoder.conv_out, activated(_middle(encoder.mid, h), encoder.norm_out), dim)
    if model.embed_dim is not None:
        out = map(model.quant_conv, out)
    return torch.cat(list(out), dim)


def decode_exact(model: AutoEncoderKL, z: Tensor, strip_bytes: int | None = None) -> Tensor:
    """Latents [B, z, h, w] -> images [B, C, H, W], as `AutoEncoderKL.decode` computes them.

    Raises:
        ValueError: as `encode_exact`.
    """
    check_exact(model)
    decoder, channels = model.decoder, model.config.channels
    cut = _Cut(z, strip_bytes)
    dim = cut.dim
    strips = split(z, dim, cut.lines(channels[-1]))
    if model.embed_dim is not None:
        strips = map(model.post_quant_conv, strips)
    h = _middle(decoder.mid, FeatureMap.collect(convolve(decoder.conv_in, strips, dim), dim))
    for doublings, part in enumerate(reversed(decoder.up), start=1):
        h = _level(part, h)
        if isinstance(part.upsample, Upsample):
            # the channels stay until the first block of the next level
            h = upsample(part.upsample, h, cut.lines(channels[-doublings], doublings))
    out = convolve(decoder.conv_out, activated(h, decoder.norm_out), dim)
    image = torch.cat(list(out), dim)
    return image.tanh_() if decoder.tanh_out else image


def check_exact(model: AutoEncoderKL) -> None:
    """Raise ValueError, with the part and the fix, unless the model can be computed in strips."""
    names = {module: name for name, module in model.named_modules()}
    for half in (model.encoder, model.decoder):
        inside = list(half.modules())
        levels = [x for x in inside if isinstance(x, (DownLevel, UpLevel))]
        blocks: list[Any] = [block for level in levels for block in _listed(level.block)]
        blocks += [half.mid.block_1, half.mid.block_2]
        _refuse_others(blocks, (ResnetBlock, FastResnetBlock), names)
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
        norms += [x.norm for x in inside if type(x) is VanillaAttention]
        _refuse_others([*norms, half.norm_out], NORMS, names)
        convs = [conv for block in blocks for conv in (block.conv1, block.conv2)]
        convs += [x.conv for x in inside if isinstance(x, Upsample) and x.with_conv]
        _refuse_others([half.conv_in, *convs, half.conv_out], CONVOLUTIONS, names)


def _listed(modules: nn.Module) -> list[nn.Module]:
    assert isinstance(modules, nn.ModuleList)
    return list(modules)


def _refuse_others(
    parts: Sequence[nn.Module],
    known: tuple[type[nn.Module], ...],
    names: dict[nn.Module, str],
) -> None:
    # what is not called here: a subclass, a hook or another forward may compute something else
    for part in parts:
        if type(part) not in known:
            what = f"is a {type(part).__name__}"
        elif (
            not is_untouched(part, *known)
            or any(parameter.is_meta for parameter in part.parameters())
            or (isinstance(part, nn.Conv2d) and part.padding_mode != "zeros")
        ):
            what = "was changed (hooks, another forward or padding, offloaded weights)"
        else:
            continue
        raise ValueError(
            f"mode='exact': {names[part]} {what}, which cannot be computed in strips; "
            "use mode='whole', or 'blend' where that does not fit into the memory"
        )


def _level(part: nn.Module, x: FeatureMap) -> FeatureMap:
    assert isinstance(part, (DownLevel, UpLevel))
    attentions = _listed(part.attn)
    for i, block in enumerate(_listed(part.block)):
        x = resnet_block(block, x)
        if attentions:
            x = attention(attentions[i], x)
    return x


def _middle(middle: Middle, x: FeatureMap) -> FeatureMap:
    x = attention(middle.attn_1, resnet_block(middle.block_1, x))
    return resnet_block(middle.block_2, x)


class _Cut:
    """Along which axis a map is cut, and how many lines a strip has at each resolution."""

    def __init__(self, x: Tensor, strip_bytes: int | None) -> None:
        height, width = x.shape[2:]
        self.dim = 3 if width > height else 2
        self._positions = x.shape[0] * min(height, width)  # of a line, in all images
        if strip_bytes is None:
            strip_bytes = STRIP_BYTES.get(x.device.type, OTHER_STRIP_BYTES)
        self._strip_bytes = strip_bytes

    def lines(self, channels: int, doublings: int = 0) -> int:
        """Lines of a strip of so many channels, after so many doublings of the resolution; even."""
        line_bytes = 4 * channels * self._positions * 2.0**doublings
        return 2 * max(1, int(self._strip_bytes / (2 * line_bytes)))


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
