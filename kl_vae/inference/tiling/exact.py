"""Encoding and decoding in strips, with the same result as for the whole image.

Each feature map is stored as strips along its longer axis. Each layer processes the strips once,
and a strip is freed after its last use, so that about two feature maps exist at a time. Nothing is
computed twice: a convolution reads one line from each neighbouring strip, a group norm uses the
moments of the whole feature map, and attention uses the keys and values of all positions.

Shapes: B batch, C channels, H and W image height and width, h = H/f, w = W/f, z latent channels, N
positions of a feature map, n positions of a strip.
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

# size of a strip of the level's widest feature map in float32; on CPUs, strips that fit into the
# cache are fastest
STRIP_BYTES = {"cpu": 8 * 2**20}
OTHER_STRIP_BYTES = 64 * 2**20
# size of the scores of one chunk of queries, on devices whose attention materialises them
SCORE_BYTES = 256 * 2**20


def encode_exact(model: AutoEncoderKL, images: Tensor, strip_bytes: int | None = None) -> Tensor:
    """Encode images [B, C, H, W] to moments [B, 2z, h, w], equal to `AutoEncoderKL.encode`.

    Raises:
        ValueError: a part of the model cannot be computed in strips.
    """
    check_exact(model)
    encoder, channels = model.encoder, model.config.channels
    images = images.to(model.dtype)
    layout = _StripLayout(images, strip_bytes)
    dim = layout.dim
    strips = split(images, dim, layout.lines(max(model.config.ch, channels[0])))
    h = FeatureMap.collect(convolve(encoder.conv_in, strips, dim), dim)
    for level, part in enumerate(encoder.down):
        h = _level(part, h)
        if isinstance(part.downsample, Downsample):
            lines = layout.lines(max(channels[level : level + 2]), -(level + 1))
            h = downsample(part.downsample, h, lines)
    out = convolve(encoder.conv_out, activated(_middle(encoder.mid, h), encoder.norm_out), dim)
    if model.embed_dim is not None:
        out = map(model.quant_conv, out)
    return torch.cat(list(out), dim)


def decode_exact(model: AutoEncoderKL, z: Tensor, strip_bytes: int | None = None) -> Tensor:
    """Decode latents [B, z, h, w] to images [B, C, H, W], equal to `AutoEncoderKL.decode`.

    Raises:
        ValueError: see `encode_exact`.
    """
    check_exact(model)
    decoder, channels = model.decoder, model.config.channels
    z = z.to(model.dtype)
    layout = _StripLayout(z, strip_bytes)
    dim = layout.dim
    strips = split(z, dim, layout.lines(channels[-1]))
    if model.embed_dim is not None:
        strips = map(model.post_quant_conv, strips)
    h = _middle(decoder.mid, FeatureMap.collect(convolve(decoder.conv_in, strips, dim), dim))
    for doublings, part in enumerate(reversed(decoder.up), start=1):
        h = _level(part, h)
        if isinstance(part.upsample, Upsample):
            # the number of channels changes only in the first block of the next level
            h = upsample(part.upsample, h, layout.lines(channels[-doublings], doublings))
    out = convolve(decoder.conv_out, activated(h, decoder.norm_out), dim)
    image = torch.cat(list(out), dim)
    return image.tanh_() if decoder.tanh_out else image


def check_exact(model: AutoEncoderKL) -> None:
    """Raise ValueError unless the model can be computed in strips."""
    names = {module: name for name, module in model.named_modules()}
    for coder in (model.encoder, model.decoder):
        submodules = list(coder.modules())
        levels = [x for x in submodules if isinstance(x, (DownLevel, UpLevel))]
        blocks: list[Any] = [block for level in levels for block in _module_list(level.block)]
        blocks += [coder.mid.block_1, coder.mid.block_2]
        _check_types(blocks, (ResnetBlock, FastResnetBlock), names)
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
        norms += [x.norm for x in submodules if type(x) is VanillaAttention]
        _check_types([*norms, coder.norm_out], NORMS, names)
        convs = [conv for block in blocks for conv in (block.conv1, block.conv2)]
        convs += [x.conv for x in submodules if isinstance(x, Upsample) and x.with_conv]
        _check_types([coder.conv_in, *convs, coder.conv_out], CONVOLUTIONS, names)


def _module_list(modules: nn.Module) -> list[nn.Module]:
    assert isinstance(modules, nn.ModuleList)
    return list(modules)


def _check_types(
    parts: Sequence[nn.Module],
    known: tuple[type[nn.Module], ...],
    names: dict[nn.Module, str],
) -> None:
    # these modules are not called, and a subclass, hook or other forward may compute other values
    for part in parts:
        if type(part) not in known:
            problem = f"is a {type(part).__name__}"
        elif (
            not is_untouched(part, *known)
            or any(parameter.is_meta for parameter in part.parameters())
            or (isinstance(part, nn.Conv2d) and part.padding_mode != "zeros")
        ):
            problem = "was modified (hooks, another forward or padding, offloaded weights)"
        else:
            continue
        raise ValueError(
            f"mode='exact': {names[part]} {problem}, which cannot be computed in strips; "
            "use mode='whole', or 'blend' if that does not fit into memory"
        )


def _level(part: nn.Module, x: FeatureMap) -> FeatureMap:
    assert isinstance(part, (DownLevel, UpLevel))
    attentions = _module_list(part.attn)
    for i, block in enumerate(_module_list(part.block)):
        x = resnet_block(block, x)
        if attentions:
            x = attention(attentions[i], x)
    return x


def _middle(middle: Middle, x: FeatureMap) -> FeatureMap:
    x = attention(middle.attn_1, resnet_block(middle.block_1, x))
    return resnet_block(middle.block_2, x)


class _StripLayout:
    """Axis along which feature maps are split, and the height of a strip at each resolution."""

    def __init__(self, x: Tensor, strip_bytes: int | None) -> None:
        height, width = x.shape[2:]
        self.dim = 3 if width > height else 2
        self._positions = x.shape[0] * min(height, width)  # per line, over the batch
        if strip_bytes is None:
            strip_bytes = STRIP_BYTES.get(x.device.type, OTHER_STRIP_BYTES)
        self._strip_bytes = strip_bytes

    def lines(self, channels: int, doublings: int = 0) -> int:
        """Return the lines per strip, an even number, for a feature map with `channels` channels.

        `doublings` is the binary logarithm of its resolution relative to the input.
        """
        line_bytes = 4 * channels * self._positions * 2.0**doublings
        return 2 * max(1, int(self._strip_bytes / (2 * line_bytes)))


def convolve(conv: nn.Conv2d, strips: Strips, dim: int) -> Strips:
    """Apply a 3 x 3 convolution of stride 1 to a stream of strips.

    This always uses `F.conv2d`; other algorithms would transform the weight for each strip.
    """
    padding = (0, 1) if dim == 2 else (1, 0)
    weight = conv.weight
    if weight.device.type == "cpu":
        weight = weight.contiguous()  # the output has the same layout, and `Moments` needs this one
    return (F.conv2d(strip, weight, conv.bias, padding=padding) for strip in with_halo(strips, dim))


def activated(x: FeatureMap, norm: nn.Module, source: Strips | None = None) -> Strips:
    """Stream silu(norm(x)), from `source` (the strips of x) or, if None, from `x.drain()`."""
    normalize = x.moments.normalization(norm)
    for strip in x.drain() if source is None else source:
        yield F.silu(normalize(strip), inplace=True)


def resnet_block(block: nn.Module, x: FeatureMap) -> FeatureMap:
    """Apply a `ResnetBlock` to x. Strips of x and of the hidden feature map are freed after use."""
    assert isinstance(block, ResnetBlock), "check_exact"
    shortcut: Callable[[Tensor], Tensor] = block.nin_shortcut if block.has_shortcut else _identity
    first = activated(x, block.norm1, x.replace(shortcut))
    h = FeatureMap.collect(convolve(block.conv1, first, x.dim), x.dim)
    second = (block.dropout(strip) for strip in activated(h, block.norm2))
    convolved = convolve(block.conv2, second, x.dim)
    return FeatureMap.collect(map(_sum, x.drain(), convolved), x.dim)


def attention(module: nn.Module, x: FeatureMap) -> FeatureMap:
    """Apply an attention module to x and drain it.

    An unknown type of attention is applied to the whole feature map at once.
    """
    if isinstance(module, nn.Identity):
        return x
    if type(module) is VanillaAttention:
        return _vanilla_attention(module, x)
    lines = x.strips[0].shape[x.dim]
    return FeatureMap.collect(split(module(x.whole()), x.dim, lines), x.dim)


def downsample(module: Downsample, x: FeatureMap, lines: int) -> FeatureMap:
    """Apply `Downsample` to x and drain it.

    The strips of x have an even number of lines; those of the result have `lines` lines.
    """
    if module.with_conv:
        across = (0, 1, 0, 0) if x.dim == 2 else (0, 0, 0, 1)  # pad at the right or the bottom
        halved = (
            module.conv(F.pad(strip, across)) for strip in with_halo(x.drain(), x.dim, before=False)
        )
    else:
        halved = (F.avg_pool2d(strip, 2) for strip in x.drain())
    return FeatureMap.collect(regroup(halved, x.dim, lines), x.dim)


def upsample(module: Upsample, x: FeatureMap, lines: int) -> FeatureMap:
    """Apply `Upsample` to x and drain it.

    The strips of the result have `lines` lines, an even number.
    """
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
    # [B, 1, N, C] each, with the positions in the order of the strips
    k, v = (torch.cat(parts, 2).contiguous() for parts in (keys, values))
    del keys, values

    def attend(strip: Tensor) -> Tensor:
        h = normalize(strip)
        q = as_sequence(module.q(h)).contiguous()  # [B, 1, n, C]
        out = torch.cat([F.scaled_dot_product_attention(chunk, k, v) for chunk in chunks(q, k)], 2)
        projected: Tensor = module.proj_out(out[:, 0].transpose(1, 2).reshape(h.shape))
        return _sum(strip, projected)

    return FeatureMap.collect(map(attend, x.drain()), x.dim)


def chunks(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Split queries [B, 1, n, C] into chunks whose scores over all keys fit into SCORE_BYTES."""
    scores = k.shape[0] * k.shape[2] * k.element_size()  # bytes per query
    return torch.split(q, max(1, SCORE_BYTES // scores), 2)


def _sum(strip: Tensor, increment: Tensor) -> Tensor:
    # in place, so that long-lived tensors are not reallocated, which would fragment the memory
    return strip.add_(increment) if strip.dtype == increment.dtype else strip + increment


def _identity(strip: Tensor) -> Tensor:
    return strip
