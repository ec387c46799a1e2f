"""Inference of the architecture from a state dict in the CompVis layout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from kl_vae.ddconfig import DDConfig

RESOLUTION = 256  # of the published configs; it only determines `attn_resolutions`

MAX_LEVELS = 32  # limits the resolution, a power of 2

# _CONVOLUTIONS are in every autoencoder, _OPTIONAL in some
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


# keys of ddconfig that change results, and that no name or shape of a tensor shows, or not always
_NOT_SHOWN = (
    *("norm_groups", "tanh_out", "norm_type", "block_type"),
    *("attn_type", "double_z", "resamp_with_conv"),
)


# models whose weights are often given in place of an autoencoder's, by the names of tensors
_OTHER_MODELS = {
    "a LoRA": re.compile(r"(^|[._])lora([._]|$)"),
    "a diffusion model": re.compile(
        r"(^|\.)(input_blocks|output_blocks|double_blocks|single_blocks|joint_blocks"
        r"|transformer_blocks|single_transformer_blocks|time_embedding)\."
    ),
    "a language model": re.compile(
        r"(^|\.)(embed_tokens|lm_head|wte|tok_embeddings|word_embeddings|token_embedding|shared)\."
    ),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The part of ddconfig and embed_dim that is determined by the tensors of an autoencoder.

    `norm_groups`, `dropout`, `tanh_out` and `resolution` are not determined. Attention is therefore
    given by level (0: full resolution) instead of by resolution.
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
        """Return the architecture of a complete ddconfig (all keys present) and embed_dim."""
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
            # with one level there is no resampling
            resamp_with_conv=ddconfig["resamp_with_conv"] or len(levels) == 1,
            context_channels=ddconfig["context_channels"],
        )

    def params(self) -> dict[str, Any]:
        """Return `model.params` with this architecture and defaults for the other keys."""
        resolution = max(RESOLUTION, 2 ** (len(self.ch_mult) - 1))
        ddconfig = dataclasses.asdict(self)
        embed_dim = ddconfig.pop("embed_dim")
        levels = ddconfig.pop("attention_levels")
        ddconfig["resolution"] = resolution
        ddconfig["attn_resolutions"] = tuple(resolution >> level for level in levels)
        return {"ddconfig": ddconfig, "embed_dim": embed_dim}

    def differences(self, other: Architecture) -> str:
        """Describe how this architecture differs from `other`: `ch=128 (not 64), ...`."""
        fields = [field.name for field in dataclasses.fields(self)]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in fields}
        return ", ".join(
            f"{name}={_format(own)} (not {_format(others)})"
            for name, (own, others) in pairs.items()
            if own != others
        )


def infer_architecture(tensors: Mapping[str, Tensor], source: str) -> Architecture:
    """Infer the architecture of an autoencoder from the names and shapes of its tensors.

    Args:
        tensors: state dict in the CompVis layout, without prefixes.
        source: name of the file or model in error messages.

    Raises:
        ValueError: The tensors are not a complete KL autoencoder, or no ddconfig describes it.
    """
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    _check_kind(shapes, source)
    down, up = _levels(shapes, "encoder.down", source), _levels(shapes, "decoder.up", source)
    kinds = [_attention(shapes, side) for side in ("encoder", "decoder")]
    for text, of_encoder, of_decoder in (
        ("{} channels per level", down.channels, up.channels),
        ("attention in the levels {}", down.attention, up.attention),
        ("num_res_blocks={}", down.blocks, up.blocks - 1),
        ("attention of type {} in the middle block", *kinds),
    ):
        if of_encoder != of_decoder:
            raise ValueError(
                f"{source}: its encoder has {text.format(of_encoder)}, its decoder "
                f"{text.format(of_decoder)}: not supported by ddconfig"
            )
    if kinds[0] == "none" and down.attention:
        raise ValueError(
            f"{source}: has attention in the levels {down.attention} and none in the middle block: "
            "not supported by ddconfig"
        )
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    if any(channels % ch for channels in down.channels):
        raise ValueError(
            f"{source}: its levels have {down.channels} channels, which are not all multiples of "
            f"the {ch} channels of the first convolution: not supported by ddconfig"
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


def check_stated(asked: DDConfig, stated: Mapping[str, Any] | None, source: str) -> None:
    """Compare the parts of a ddconfig that tensors do not show with those that a file states.

    Results change silently if they differ: the tensors of a model with 8 and with 32 groups are the
    same.

    Args:
        asked: the ddconfig of the model that the weights are loaded into.
        stated: `model.params` of the file; None: it states nothing. Missing keys have the defaults
            of `DDConfig`, with which the file was written.
        source: name of the file in error messages.

    Raises:
        ValueError: They differ; the message has one line with all values.
    """
    ddconfig = (stated or {}).get("ddconfig")
    if not isinstance(ddconfig, Mapping):
        return
    defaults = {field.name: field.default for field in dataclasses.fields(DDConfig)}
    there, own = ({**defaults, **given} for given in (ddconfig, dataclasses.asdict(asked)))
    for values in (there, own):
        values["attn_type"] = "linear" if values["use_linear_attn"] else values["attn_type"]
    keys = [key for key in _NOT_SHOWN if there[key] != own[key]]
    if len(asked.ch_mult) == 1 and "resamp_with_conv" in keys:
        keys.remove("resamp_with_conv")  # with one level there is no resampling
    if keys:
        pairs = (f"{key}={_format(there[key])} (not {_format(own[key])})" for key in keys)
        raise ValueError(f"{source}: states {', '.join(pairs)}; use the values that it states")


def not_stated(config: DDConfig) -> str:
    """Describe what a bare state dict is assumed to have, since its tensors do not show it."""
    return f"norm_groups={config.norm_groups}, tanh_out={_format(config.tanh_out)}"


def other_model(keys: Iterable[str]) -> str | None:
    """Describe the model that tensors with these names belong to; None: unknown."""
    ordered = sorted(keys)
    for model, pattern in _OTHER_MODELS.items():
        key = next((key for key in ordered if pattern.search(key)), None)
        if key is not None:
            return f"the weights of {model} ({ascii(key)[1:-1]}), not of a KL autoencoder"
    return None


class _Levels(NamedTuple):
    """Levels of the encoder or decoder, starting at full resolution."""

    channels: tuple[int, ...]
    blocks: int  # per level
    attention: tuple[int, ...]  # levels with attention


def _check_kind(shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Check that the tensors are those of a KL autoencoder of images.

    Raises:
        ValueError: They are not.
    """
    if any(key.startswith("quantize.") for key in shapes):
        raise ValueError(
            f"{source}: a VQ autoencoder, which is not supported; give a KL autoencoder"
        )
    missing = [key for key in _CONVOLUTIONS if key not in shapes]
    if missing:
        if (model := other_model(shapes)) is not None:
            raise ValueError(f"{source}: {model}; give those of an autoencoder")
        some = ", ".join(ascii(key)[1:-1] for key in sorted(shapes)[:3])
        raise ValueError(
            f"{source}: not a complete KL autoencoder: {missing[0]} is missing; it has "
            f"{len(shapes)} tensors, such as {some or 'none'}"
        )
    for key in (*_CONVOLUTIONS, *_OPTIONAL, _CONTEXT):
        axes = ("out", "in") if key == _CONTEXT else ("out", "in", "height", "width")
        shape = shapes.get(key, (1,) * len(axes))
        if len(shape) != len(axes) or 0 in shape:
            raise ValueError(
                f"{source}: not an autoencoder of images: {key} has shape {list(shape)}, expected "
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
            f"{source}: not a complete KL autoencoder: {prefix} has "
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


def _format(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else "null" if value is None else str(value)
