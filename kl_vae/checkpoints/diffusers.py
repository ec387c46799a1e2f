"""diffusers' config.json of an autoencoder, and `model.params` of ours."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from kl_vae.checkpoints.architecture import MAX_LEVELS

EPS = 1.0e-4  # of the batch norm
_MOVED = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
_MEAN, _VAR, _COUNT = "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"


def with_quant_convolutions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.2's tensors with the quant convolutions where CompVis has them."""
    return {_moved(key): x for key, x in tensors.items()}


def take_batch_norm(
    tensors: Mapping[str, Tensor], eps: float = EPS
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Split the batch norm off: the other tensors, and it as `model.params.latents`, or None."""
    rest = {key: x for key, x in tensors.items() if key not in (_MEAN, _VAR, _COUNT)}
    channels = _latent_channels(tensors)
    if _MEAN not in tensors or _VAR not in tensors or not channels:
        return rest, None
    mean, var = (tensors[key].double().flatten() for key in (_MEAN, _VAR))
    latents = {
        "mean": tuple(mean.tolist()),
        "std": tuple((var + eps).sqrt().tolist()),
        "patch_size": math.isqrt(mean.numel() // channels),
        "per_channel": True,
    }
    return rest, latents


def batch_norm(latents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the batch norm that normalises as `latents` say."""
    std = torch.tensor(latents["std"], dtype=torch.float64)
    return {
        _MEAN: torch.tensor(latents["mean"], dtype=torch.float64).float(),
        _VAR: (std.square() - EPS).float(),
        _COUNT: torch.tensor(0),
    }


def _latent_channels(tensors: Mapping[str, Tensor]) -> int:
    """Channels of the first convolution that latents go through; 0: there is none."""
    for key in ("post_quant_conv.weight", "decoder.conv_in.weight"):
        if key in tensors:
            return 0 if tensors[key].ndim < 2 else tensors[key].shape[1]
    return 0


def _moved(key: str) -> str:
    for old, new in _MOVED.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


# ours, diffusers'; {level} and {i} are numbers
_PATHS = (
    ("encoder.mid.block_1", "encoder.mid_block.resnets.0"),
    ("encoder.mid.attn_1", "encoder.mid_block.attentions.0"),
    ("encoder.mid.block_2", "encoder.mid_block.resnets.1"),
    ("encoder.norm_out", "encoder.conv_norm_out"),
    ("encoder.down.{level}.block.{i}", "encoder.down_blocks.{level}.resnets.{i}"),
    ("encoder.down.{level}.attn.{i}", "encoder.down_blocks.{level}.attentions.{i}"),
    ("encoder.down.{level}.downsample", "encoder.down_blocks.{level}.downsamplers.0"),
    ("decoder.mid.block_1", "decoder.mid_block.resnets.0"),
    ("decoder.mid.attn_1", "decoder.mid_block.attentions.0"),
    ("decoder.mid.block_2", "decoder.mid_block.resnets.1"),
    ("decoder.norm_out", "decoder.conv_norm_out"),
    ("decoder.up.{level}.block.{i}", "decoder.up_blocks.{level}.resnets.{i}"),
    ("decoder.up.{level}.attn.{i}", "decoder.up_blocks.{level}.attentions.{i}"),
    ("decoder.up.{level}.upsample", "decoder.up_blocks.{level}.upsamplers.0"),
)
# within residual blocks, and within attention; its second name was diffusers' until 0.14
_BLOCK = {"nin_shortcut": ("conv_shortcut",)}
_ATTENTION = {
    "norm": ("group_norm",),
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "proj_out": ("to_out.0", "proj_attn"),
}
_PROJECTION = re.compile(r"(encoder|decoder)\..*attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight")


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether these are diffusers' names."""
    return any(re.match(r"(encoder|decoder)\.(mid_block|down_blocks|up_blocks)\.", k) for k in keys)


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers' tensors to our names; what no rule names keeps its own."""
    return with_kernels(_renamed(tensors, _OURS))


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors to diffusers' names."""
    flat = {key: x[..., 0, 0] if _PROJECTION.fullmatch(key) else x for key, x in tensors.items()}
    return _renamed(flat, _THEIRS)


def with_kernels(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors with attention's projections as 1 x 1 kernels, [C, C] -> [C, C, 1, 1]."""
    return {
        key: x[:, :, None, None] if x.ndim == 2 and _PROJECTION.fullmatch(key) else x
        for key, x in tensors.items()
    }


_Rule = tuple[re.Pattern[str], str, dict[str, str]]


def _rules() -> tuple[list[_Rule], list[_Rule]]:
    """Rules from diffusers' names to ours, and back: pattern, its replacement, names within."""
    ours, theirs = [], []
    for own, other in _PATHS:
        names = _ATTENTION if ".attn" in own else _BLOCK
        to_own = {old: name for name, olds in names.items() for old in olds}
        to_other = {name: olds[0] for name, olds in names.items()}
        ours.append((_pattern(other), own, to_own))
        theirs.append((_pattern(own), other, to_other))
    return ours, theirs


def _pattern(path: str) -> re.Pattern[str]:
    text = re.escape(path)
    for name in ("level", "i"):
        text = text.replace(rf"\{{{name}\}}", rf"(?P<{name}>\d{{1,4}})")
    return re.compile(text + r"\.(?P<leaf>.*)")


_OURS, _THEIRS = _rules()


def _renamed(tensors: Mapping[str, Tensor], rules: list[_Rule]) -> dict[str, Tensor]:
    numbers = (re.match(r"decoder\.up(?:_blocks)?\.(\d{1,4})\.", key) for key in tensors)
    levels = 1 + max((int(number[1]) for number in numbers if number), default=0)
    return {_rename(key, rules, levels): x for key, x in tensors.items()}


def _rename(key: str, rules: list[_Rule], levels: int) -> str:
    for pattern, target, names in rules:
        match = pattern.fullmatch(key)
        if match is None:
            continue
        parts = match.groupdict()
        if "level" in parts:
            level = int(parts["level"])
            parts["level"] = str(levels - 1 - level if target.startswith("decoder") else level)
        leaf, _, kind = parts.pop("leaf").rpartition(".")
        leaf = names.get(leaf, leaf)
        return ".".join(filter(None, (target.format(**parts), leaf, kind)))
    return key


SCALING_FACTOR = 0.18215  # diffusers' default, which the oldest config files leave out
PLAIN, FLUX2 = "AutoencoderKL", "AutoencoderKLFlux2"
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # whether with attention
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_TYPES = {int: "a whole number", float: "a finite number", bool: "true or false", list: "a list"}


def params_of_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`model.params` that a config.json describes.

    Args:
        config: its content.
        source: its name, for errors.

    Raises:
        ValueError: not of a KL autoencoder, or of one that no ddconfig describes.
    """
    kind = config.get("_class_name", PLAIN)
    if kind not in (PLAIN, FLUX2):
        raise ValueError(f"{source}: of {kind!r}; kl_vae reads {PLAIN} and {FLUX2}")
    reader = _Reader(config, source)
    channels = reader.get("block_out_channels", list, [64])
    down = reader.get("down_block_types", list, ["DownEncoderBlock2D"])
    up = reader.get("up_block_types", list, ["UpDecoderBlock2D"])
    for key, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        if len(types) != len(channels) or not all(name in known for name in map(str, types)):
            reader.refuse(key, types, f"give one of {', '.join(known)} for each level")
    attention = [_DOWN[name] for name in down]
    if attention != [_UP[name] for name in reversed(up)]:
        reader.refuse("up_block_types", up, "attention in other levels than down_block_types has")
    in_middle = reader.get("mid_block_add_attention", bool, True)
    if any(attention) and not in_middle:
        reader.refuse("mid_block_add_attention", False, "attention in levels, none in the middle")
    if not channels or not all(type(c) is int and c > 0 for c in channels):
        reader.refuse("block_out_channels", channels, "must be whole numbers above 0")
    if len(channels) > MAX_LEVELS:
        reader.refuse("block_out_channels", channels, f"more than {MAX_LEVELS} levels")
    if any(c % channels[0] for c in channels):
        reader.refuse("block_out_channels", channels, "must be multiples of the first")
    if reader.get("decoder_block_out_channels", list, channels) != channels:
        reader.refuse(
            "decoder_block_out_channels",
            config["decoder_block_out_channels"],
            f"must be as block_out_channels, {channels}",
        )
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        reader.refuse("act_fn", config["act_fn"], "must be silu")
    quant = [reader.get(f"use_{name}_conv", bool, True) for name in ("quant", "post_quant")]
    if quant[0] != quant[1]:
        reader.refuse("use_quant_conv", quant[0], f"use_post_quant_conv={quant[1]} differs")
    z_channels = reader.get("latent_channels", int, 4)
    resolution = _resolution(config.get("sample_size"), len(channels))
    ddconfig = {
        "ch": channels[0],
        "ch_mult": tuple(c // channels[0] for c in channels),
        "num_res_blocks": reader.get("layers_per_block", int, 1),
        "attn_resolutions": tuple(resolution >> i for i, has in enumerate(attention) if has),
        "attn_type": "vanilla" if in_middle else "none",
        "in_channels": reader.get("in_channels", int, 3),
        "out_ch": reader.get("out_channels", int, 3),
        "resolution": resolution,
        "z_channels": z_channels,
        "norm_groups": reader.get("norm_num_groups", int, 32),
    }
    # FLUX.2's lie in a batch norm among the tensors
    latents = _latents(reader, z_channels) if kind == PLAIN else None
    if "batch_norm_eps" in config and reader.get("batch_norm_eps", float, -1.0) < 0.0:
        reader.refuse("batch_norm_eps", config["batch_norm_eps"], "must be at least 0")
    return {"ddconfig": ddconfig, "embed_dim": z_channels if quant[0] else None, "latents": latents}


def config_of_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        params: whole `model.params`, each key of the ddconfig given.

    Raises:
        ValueError: what diffusers cannot express, all of it.
    """
    ddconfig = params["ddconfig"]
    errors = inexpressible(params)
    if errors:
        raise ValueError(f"diffusers cannot express this model: {'; '.join(errors)}")
    levels = range(len(ddconfig["ch_mult"]))
    attended = [
        ddconfig["attn_type"] != "none"
        and ddconfig["resolution"] // 2**level in ddconfig["attn_resolutions"]
        for level in levels
    ]
    latents = params.get("latents") or {"scale_factor": 1.0}
    per_channel = latents.get("per_channel", False)
    patched = per_channel and latents.get("patch_size", 1) > 1
    quant = params["embed_dim"] is not None
    config = {
        "_class_name": FLUX2 if patched else PLAIN,
        "act_fn": "silu",
        "block_out_channels": [ddconfig["ch"] * multiple for multiple in ddconfig["ch_mult"]],
        "down_block_types": [
            "AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attended
        ],
        "in_channels": ddconfig["in_channels"],
        "latent_channels": ddconfig["z_channels"],
        "layers_per_block": ddconfig["num_res_blocks"],
        "mid_block_add_attention": ddconfig["attn_type"] != "none",
        "norm_num_groups": ddconfig["norm_groups"],
        "out_channels": ddconfig["out_ch"],
        "sample_size": ddconfig["resolution"],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attended[::-1]
        ],
        "use_post_quant_conv": quant,
        "use_quant_conv": quant,
    }
    if patched:
        p = latents["patch_size"]
        return {**config, "batch_norm_eps": EPS, "batch_norm_momentum": 0.1, "patch_size": [p, p]}
    return {
        **config,
        "force_upcast": True,
        # pipelines that know latents_mean multiply by scaling_factor as well
        "scaling_factor": 1.0 if per_channel else latents.get("scale_factor", 1.0),
        "shift_factor": None if per_channel else latents.get("shift_factor") or None,
        "latents_mean": list(latents["mean"]) if per_channel else None,
        "latents_std": list(latents["std"]) if per_channel else None,
    }


def inexpressible(params: Mapping[str, Any]) -> list[str]:
    """What of a model diffusers' autoencoder has no place for."""
    ddconfig, embed_dim = params["ddconfig"], params["embed_dim"]
    kind = "linear" if ddconfig["use_linear_attn"] else ddconfig["attn_type"]
    errors = []
    if kind not in ("vanilla", "none"):
        errors.append(f"attn_type={kind}: it has softmax attention only")
    if embed_dim not in (None, ddconfig["z_channels"]):
        errors.append(
            f"embed_dim={embed_dim}: it has latents of z_channels={ddconfig['z_channels']} only"
        )
    if ddconfig["ch_mult"][0] != 1:
        errors.append(f"ch_mult={list(ddconfig['ch_mult'])}: its first level has ch channels")
    if not ddconfig["resamp_with_conv"] and len(ddconfig["ch_mult"]) > 1:
        errors.append("resamp_with_conv=false: it resamples with convolutions")
    if ddconfig["tanh_out"]:
        errors.append("tanh_out=true: its decoder ends in a convolution")
    if ddconfig["context_channels"]:
        errors.append(f"context_channels={ddconfig['context_channels']}: it takes no context")
    for key, only in (("norm_type", "group"), ("block_type", "resnet")):
        if ddconfig[key] != only:
            errors.append(f"{key}={ddconfig[key]}: it has {only} only")
    return errors


class _Reader:
    """Values of a config.json by key, of the type that they must have."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config = config
        self.source = source

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.config.get(key)
        if value is None:
            return default
        if not _is(kind, value):
            self.refuse(key, value, f"must be {_TYPES[kind]}")
        return float(value) if kind is float else value

    def refuse(self, key: str, value: object, why: str) -> None:
        raise ValueError(f"{self.source}: {key}={value!r:.80}: {why}")


def _is(kind: type, value: object) -> bool:
    if kind is float:  # a whole number as well, but no NaN nor one beyond 1e308
        return type(value) in (int, float) and abs(cast(float, value)) <= sys.float_info.max
    return type(value) is kind


def _latents(reader: _Reader, z_channels: int) -> dict[str, Any]:
    scale = reader.get("scaling_factor", float, SCALING_FACTOR)
    if scale <= 0.0:
        reader.refuse("scaling_factor", scale, "must be above 0")
    mean, std = (reader.get(f"latents_{name}", list, None) for name in ("mean", "std"))
    for key, values in (("latents_mean", mean), ("latents_std", std)):
        if values is None:
            continue
        if len(values) != z_channels or not all(_is(float, x) for x in values):
            reader.refuse(key, values, f"must be {z_channels} numbers, as latent_channels")
        if key == "latents_std" and min(values) <= 0:
            reader.refuse(key, values, "must be above 0")
    if mean is None or std is None:
        return {"scale_factor": scale, "shift_factor": reader.get("shift_factor", float, 0.0)}
    # (z - mean) * scaling_factor / std in its pipelines
    return {"mean": tuple(mean), "std": tuple(x / scale for x in std), "per_channel": True}


def _resolution(sample_size: object, levels: int) -> int:
    """`sample_size` where it can be a resolution, else one that can."""
    size = sample_size[0] if isinstance(sample_size, list) and sample_size else sample_size
    f = 2 ** (levels - 1)
    return size if type(size) is int and size > 0 and size % f == 0 else max(256, f)
