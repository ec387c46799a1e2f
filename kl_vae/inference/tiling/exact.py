"""Encode and decode in strips, with the result of the whole image.

Each feature map is held in strips along its longer axis, each layer goes over them once, and a
strip is let go as soon as it has been used: about two feature maps exist at a time. B batch, C
channels, H and W the image's height and width, h = H/f, w = W/f, z latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kl_vae.accel.convolution import CONVOLUTIONS
from kl_vae.accel.group_norm import NORMS
from kl_vae.accel.resnet_block import FastResnetBlock
from kl_vae.accel.swap import is_untouched
from kl_vae.attention import VanillaAttention
from kl_vae.blocks import Downsample, ResnetBlock, Upsample
from kl_vae.decoder import UpLevel
from kl_vae.encoder import DownLevel, Middle
from kl_vae.inference.tiling.layers import (
    activated,
    attention,
    convolve,
    downsample,
    resnet_block,
    upsample,
)
from kl_vae.inference.tiling.strips import FeatureMap, split
from kl_vae.model import AutoEncoderKL

# of a strip of the level's widest map in float32; on CPUs strips that stay in the cache are fastest
STRIP_BYTES = {"cpu": 8 * 2**20}
OTHER_STRIP_BYTES = 64 * 2**20


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
