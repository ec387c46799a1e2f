"""The architecture that a state dict of the CompVis layout shows by its names and shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

RESOLUTION = 256  # of the published configs; it only gives `attn_resolutions` their meaning

MAX_LEVELS = 32  # beyond that a resolution has no end of digits

# each autoencoder has these, and some have those
_CONVOLUTIONS = (
    "encoder.conv_in.weight",
    "encoder.conv_out.weight",
    "decoder.conv_in.weight",
    "decoder.conv_out.weight",
)
_OPTIONAL = ("quant_conv.weight", "post_quant_conv.weight")
_CONTEXT = "encoder.mid.block_1.temb_proj.weight"
_IN_LEVEL = re.compile(
    r"(?P<prefix>encoder\.down|decoder\.up)\.(?P<level>\d{1,4})\.(?P<kind>block|attn)\.\d+\.(?P<leaf>.*)"
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the tensors of an autoencoder tell of its ddconfig and embed_dim.

    They do not tell `norm_groups`, `dropout`, `tanh_out`, nor `resolution`; levels with attention
    are therefore numbered, from full resolution down.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    attn_type: str
    in_channels: int
    out_ch: int
    z_channels: int
    double_z: bool
    embed_dim: int | None
    resamp_with_conv: bool
    context_channels: int

    @classmethod
    def of_params(cls, ddconfig: Mapping[str, Any], embed_dim: int | None) -> Architecture:
        """The architecture that a whole ddconfig (each key given) and embed_dim describe."""
        levels = range(len(ddconfig["ch_mult"]))
        attn_type = "linear" if ddconfig["use_linear_attn"] else ddconfig["attn_type"]
        attended = tuple(
            level
            for level in levels
            if ddconfig["resolution"] // 2**level in ddconfig["attn_resolutions"]
        )
        return cls(
            ch=ddconfig["ch"],
            ch_mult=tuple(ddconfig["ch_mult"]),
            num_res_blocks=ddconfig["num_res_blocks"],
            attention_levels=() if attn_type == "none" else attended,
            attn_type=attn_type,
            in_channels=ddconfig["in_channels"],
            out_ch=ddconfig["out_ch"],
            z_channels=ddconfig["z_channels"],
            double_z=ddconfig["double_z"],
            embed_dim=embed_dim,
            # of one level nothing is resampled
            resamp_with_conv=ddconfig["resamp_with_conv"] or len(levels) == 1,
            context_channels=ddconfig["context_channels"],
        )

    def params(self) -> dict[str, Any]:
        """`model.params` of a model with this architecture, and defaults for the rest."""
        resolution = max(RESOLUTION, 2 ** (len(self.ch_mult) - 1))
        ddconfig = dataclasses.asdict(self)
        embed_dim = ddconfig.pop("embed_dim")
        levels = ddconfig.pop("attention_levels")
        ddconfig["resolution"] = resolution
        ddconfig["attn_resolutions"] = tuple(resolution >> level for level in levels)
        return {"ddconfig": ddconfig, "embed_dim": embed_dim}

    def differences(self, other: Architecture) -> str:
        """What this one has that `other` has not: `ch=128 (not 64), ...`."""
        fields = [field.name for field in dataclasses.fields(self)]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in fields}
        return ", ".join(
            f"{name}={_show(own)} (not {_show(others)})"
            for name, (own, others) in pairs.items()
            if own != others
        )


def infer_architecture(tensors: Mapping[str, Tensor], source: str) -> Architecture:
    """Infer the architecture of an autoencoder from its tensors alone.

    Args:
        tensors: of the CompVis layout, without prefixes.
        source: where they come from, for errors.

    Raises:
        ValueError: not the whole of a KL autoencoder, or one that no ddconfig describes.
    """
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    _check_kind(shapes, source)
    down, up = _levels(shapes, "encoder.down", source), _levels(shapes, "decoder.up", source)
    kinds = [_attention(shapes, side) for side in ("encoder", "decoder")]
    for what, of_encoder, of_decoder in (
        ("levels of {} channels", down.channels, up.channels),
        ("attention in the levels {}", down.attention, up.attention),
        ("{} residual blocks a level, less the decoder's one more", down.blocks, up.blocks - 1),
        ("attention of the kind {} in the middle", *kinds),
    ):
        if of_encoder != of_decoder:
            raise ValueError(
                f"{source}: its encoder has {what.format(of_encoder)}, its decoder "
                f"{what.format(of_decoder)}: no ddconfig describes that"
            )
    if kinds[0] == "none" and down.attention:
        raise ValueError(
            f"{source}: has attention in the levels {down.attention} and none in the middle: no "
            "ddconfig describes that"
        )
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    if any(channels % ch for channels in down.channels):
        raise ValueError(
            f"{source}: levels of {down.channels} channels are no multiples of the first "
            f"convolution's {ch}: no ddconfig describes that"
        )
    z_channels = shapes["decoder.conv_in.weight"][1]
    return Architecture(
        ch=ch,
        ch_mult=tuple(channels // ch for channels in down.channels),
        num_res_blocks=down.blocks,
        attention_levels=down.attention,
        attn_type=kinds[0],
        in_channels=in_channels,
        out_ch=shapes["decoder.conv_out.weight"][0],
        z_channels=z_channels,
        double_z=shapes["encoder.conv_out.weight"][0] != z_channels,
        embed_dim=shapes.get("post_quant_conv.weight", (0, None))[1],
        resamp_with_conv=len(down.channels) == 1
        or "encoder.down.0.downsample.conv.weight" in shapes,
        context_channels=shapes.get(_CONTEXT, (0, 0))[1],
    )


class _Levels(NamedTuple):
    """One side's levels, from full resolution down."""

    channels: tuple[int, ...]
    blocks: int  # of each level
    attention: tuple[int, ...]  # which levels have it


def _check_kind(shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Refuse what is no KL autoencoder of images."""
    if any(key.startswith("quantize.") for key in shapes):
        raise ValueError(
            f"{source}: a VQ autoencoder, whose latents are entries of a codebook; kl_vae reads KL "
            "autoencoders"
        )
    lacking = [key for key in _CONVOLUTIONS if key not in shapes]
    if lacking:
        some = ", ".join(ascii(key)[1:-1] for key in sorted(shapes)[:3])
        raise ValueError(
            f"{source}: not the whole of a KL autoencoder: no {lacking[0]} among its tensors, "
            f"{len(shapes)} in all, such as {some or 'none'}"
        )
    for key in (*_CONVOLUTIONS, *_OPTIONAL, _CONTEXT):
        axes = ("out", "in") if key == _CONTEXT else ("out", "in", "height", "width")
        shape = shapes.get(key, (1,) * len(axes))
        if len(shape) != len(axes) or 0 in shape:
            raise ValueError(
                f"{source}: not an autoencoder of images: {key} has the shape {list(shape)}, not "
                f"[{', '.join(axes)}]"
            )


def _levels(shapes: Mapping[str, tuple[int, ...]], prefix: str, source: str) -> _Levels:
    blocks: dict[int, int] = {}
    attention = set()
    for key in shapes:
        match = _IN_LEVEL.fullmatch(key)
        if match is None or match["prefix"] != prefix:
            continue
        level = int(match["level"])
        if match["kind"] == "attn":
            attention.add(level)
        elif match["leaf"] == "conv1.weight":
            blocks[level] = blocks.get(level, 0) + 1
    firsts = [shapes.get(f"{prefix}.{level}.block.0.conv1.weight") for level in range(len(blocks))]
    numbers = set(blocks.values())
    if len(numbers) != 1 or not all(firsts) or not attention <= blocks.keys():
        raise ValueError(
            f"{source}: not the whole of a KL autoencoder: {prefix} has "
            f"{[blocks[level] for level in sorted(blocks)]} residual blocks in the levels "
            f"{sorted(blocks)}"
        )
    if len(blocks) > MAX_LEVELS:
        raise ValueError(f"{source}: {prefix} has {len(blocks)} levels, more than {MAX_LEVELS}")
    channels = tuple(first[0] for first in firsts if first)
    return _Levels(channels, numbers.pop(), tuple(sorted(attention)))


def _attention(shapes: Mapping[str, tuple[int, ...]], side: str) -> str:
    for kind, leaf in (("vanilla", "q.weight"), ("linear", "to_qkv.weight")):
        if f"{side}.mid.attn_1.{leaf}" in shapes:
            return kind
    return "none"


def _show(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else "null" if value is None else str(value)
