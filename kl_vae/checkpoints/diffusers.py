"""diffusers folders: file names, tensor names, `config.json`, and the batch norm of FLUX.2.

The diffusers layout differs from the CompVis layout in the names, in the order of the decoder's
levels (diffusers starts at the lowest resolution), and in the shape of attention weights ([C, C] in
diffusers, [C, C, 1, 1] in CompVis).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from kl_vae.blocks import NORM_EPS
from kl_vae.checkpoints.architecture import MAX_LEVELS

# --- files

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
NON_EMA = "non_ema"  # variant with the raw weights, next to averaged ones
VARIANTS = ("", "fp32", "fp16", "bf16", NON_EMA)  # in order of preference
_MAX_JSON_BYTES = 1 << 24


def weight_files(variant: str = "") -> tuple[str, ...]:
    """Return the names of the weights of a variant in order of preference, with indices of shards.

    An index, whose name ends in .json, maps the names of tensors to shards.
    """
    part = f".{variant}" if variant else ""
    return tuple(
        name
        for kind in ("safetensors", "bin")
        for name in (f"{WEIGHTS}{part}.{kind}", f"{WEIGHTS}.{kind}.index{part}.json")
    )


WEIGHT_FILES = tuple(name for variant in VARIANTS for name in weight_files(variant))
_VARIANT = re.compile(
    rf"(?!.*-\d+-of-\d){WEIGHTS}\.((?P<of_file>[\w-]+)\.)?(safetensors|bin)"
    r"(\.index(\.(?P<of_index>[\w-]+))?\.json)?"
)


def variant_of(name: str) -> str | None:
    """Return the variant in a file name, "" if it has none; None: not a file of diffusers."""
    match = _VARIANT.fullmatch(name)
    return None if match is None else match["of_file"] or match["of_index"] or ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file is not a JSON object, is too large, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise ValueError("a Git LFS pointer; download it with `git lfs pull`")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"over {_MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); copy it again") from None
    return content


def shard_names(index: Path) -> list[str]:
    """Return the file names in an index, unchecked; the list may be empty."""
    weight_map = read_json(index).get("weight_map")
    return sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []


# --- names of tensors

# (CompVis, diffusers); {level} and {i} are integers
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
# CompVis to diffusers names in residual blocks and in attention; the second attention name was used
# up to diffusers 0.14
_BLOCK = {"nin_shortcut": ("conv_shortcut",)}
_ATTENTION = {
    "norm": ("group_norm",),
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "proj_out": ("to_out.0", "proj_attn"),
}
_PROJECTION = re.compile(r"(encoder|decoder)\..*attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight")
_IN_ATTENTION = re.compile(
    r"(?P<path>(encoder|decoder)\..*attn(_1|\.\d+)\.)(?P<leaf>.+)\.(?P<kind>weight|bias)"
)


def is_diffusers(keys: Iterable[str]) -> bool:
    """Return whether the keys of a state dict are in the diffusers layout."""
    return any(re.match(r"(encoder|decoder)\.(mid_block|down_blocks|up_blocks)\.", k) for k in keys)


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict from the diffusers to the CompVis layout; unknown keys are kept."""
    return with_published_attention(_renamed(tensors, _TO_COMPVIS))


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict from the CompVis to the diffusers layout; unknown keys are kept."""
    flat = {key: x[..., 0, 0] if _PROJECTION.fullmatch(key) else x for key, x in tensors.items()}
    return _renamed(flat, _TO_DIFFUSERS)


def with_published_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give attention in the CompVis layout its published names and 1 x 1 kernels [C, C, 1, 1].

    Converters of diffusers write files with other names of CompVis, but `attn_1.to_q` [C, C].
    """
    published = {}
    for key, x in tensors.items():
        match = _IN_ATTENTION.fullmatch(key)
        if match is not None and match["leaf"] in _PUBLISHED_ATTENTION:
            name = f"{match['path']}{_PUBLISHED_ATTENTION[match['leaf']]}.{match['kind']}"
            key = key if name in tensors else name  # a file with both has unexpected tensors
        if _PROJECTION.fullmatch(key) and x.ndim in (2, 3) and x[0, 0].numel() == 1:
            x = x.reshape(*x.shape[:2], 1, 1)
        published[key] = x
    return published


_PUBLISHED_ATTENTION = {old: name for name, olds in _ATTENTION.items() for old in olds}

_Rule = tuple[re.Pattern[str], str, dict[str, str]]


def _rules() -> tuple[list[_Rule], list[_Rule]]:
    """Return the rules to CompVis and to diffusers: pattern, replacement, names of submodules."""
    to_compvis, to_diffusers = [], []
    for compvis, diffusers in _PATHS:
        names = _ATTENTION if ".attn" in compvis else _BLOCK
        compvis_names = {old: name for name, olds in names.items() for old in olds}
        diffusers_names = {name: olds[0] for name, olds in names.items()}
        to_compvis.append((_pattern(diffusers), compvis, compvis_names))
        to_diffusers.append((_pattern(compvis), diffusers, diffusers_names))
    return to_compvis, to_diffusers


def _pattern(path: str) -> re.Pattern[str]:
    text = re.escape(path)
    for name in ("level", "i"):
        text = text.replace(rf"\{{{name}\}}", rf"(?P<{name}>\d{{1,4}})")
    return re.compile(text + r"\.(?P<leaf>.*)")


_TO_COMPVIS, _TO_DIFFUSERS = _rules()


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


# --- FLUX.2: the quant convolutions are in the encoder and the decoder, and the running statistics
# of a batch norm over patches of 2 x 2 latents define the normalisation of the latents

EPS = 1.0e-4  # of the batch norm
_MOVED = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
_MEAN, _VAR, _COUNT = "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"


def with_quant_convolutions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the quant convolutions of FLUX.2 to their names in the CompVis layout."""
    moved = {}
    for key, x in tensors.items():
        for old, new in _MOVED.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
        moved[key] = x
    return moved


def take_batch_norm(
    tensors: Mapping[str, Tensor], eps: float = EPS
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors without the batch norm, and the batch norm as `model.params.latents`.

    The second is None if there is no batch norm.
    """
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
    """Return the tensors of the batch norm for `model.params.latents`."""
    std = torch.tensor(latents["std"], dtype=torch.float64)
    return {
        _MEAN: torch.tensor(latents["mean"], dtype=torch.float64).float(),
        _VAR: (std.square() - EPS).float(),
        _COUNT: torch.tensor(0),
    }


def _latent_channels(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of latent channels, from the first convolution; 0: not found."""
    for key in ("post_quant_conv.weight", "decoder.conv_in.weight"):
        if key in tensors:
            return 0 if tensors[key].ndim < 2 else tensors[key].shape[1]
    return 0


# --- config.json

SCALING_FACTOR = 0.18215  # default of diffusers, missing in old config files
PLAIN, FLUX2 = "AutoencoderKL", "AutoencoderKLFlux2"
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # value: has attention
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_TYPES = {int: "an integer", float: "a finite number", bool: "true or false", list: "a list"}


def params_of_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the `model.params` of a config.json.

    Args:
        config: content of the file.
        source: name of the file in error messages.

    Raises:
        ValueError: The config is not that of a KL autoencoder, or ddconfig does not support it.
    """
    kind = config.get("_class_name", PLAIN)
    if kind not in (PLAIN, FLUX2):
        raise ValueError(f"{source}: _class_name={kind!r} is not supported; use {PLAIN} or {FLUX2}")
    reader = _Reader(config, source)
    channels = reader.get("block_out_channels", list, [64])
    down = reader.get("down_block_types", list, ["DownEncoderBlock2D"])
    up = reader.get("up_block_types", list, ["UpDecoderBlock2D"])
    for key, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        if len(types) != len(channels) or not all(name in known for name in map(str, types)):
            reader.refuse(key, types, f"give one of {', '.join(known)} for each level")
    attention = [_DOWN[name] for name in down]
    if attention != [_UP[name] for name in reversed(up)]:
        reader.refuse("up_block_types", up, "must have attention in the levels of down_block_types")
    in_middle = reader.get("mid_block_add_attention", bool, True)
    if any(attention) and not in_middle:
        reader.refuse("mid_block_add_attention", False, "must be true if levels have attention")
    if not channels or not all(type(c) is int and c > 0 for c in channels):
        reader.refuse("block_out_channels", channels, "must be positive integers")
    if len(channels) > MAX_LEVELS:
        reader.refuse("block_out_channels", channels, f"more than {MAX_LEVELS} levels")
    if any(c % channels[0] for c in channels):
        reader.refuse("block_out_channels", channels, "must be multiples of the first")
    if reader.get("decoder_block_out_channels", list, channels) != channels:
        reader.refuse(
            "decoder_block_out_channels",
            config["decoder_block_out_channels"],
            f"must equal block_out_channels, {channels}",
        )
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        reader.refuse("act_fn", config["act_fn"], "must be silu")
    if reader.get("norm_eps", float, NORM_EPS) != NORM_EPS:
        reader.refuse("norm_eps", config["norm_eps"], f"must be {NORM_EPS}, the only supported one")
    quant = [reader.get(f"use_{name}_conv", bool, True) for name in ("quant", "post_quant")]
    if quant[0] != quant[1]:
        reader.refuse("use_quant_conv", quant[0], f"must equal use_post_quant_conv={quant[1]}")
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
    # for FLUX.2 they are in a batch norm in the weights
    latents = _latents(reader, z_channels) if kind == PLAIN else None
    if "batch_norm_eps" in config and reader.get("batch_norm_eps", float, -1.0) < 0.0:
        reader.refuse("batch_norm_eps", config["batch_norm_eps"], "must be at least 0")
    return {"ddconfig": ddconfig, "embed_dim": z_channels if quant[0] else None, "latents": latents}


def config_of_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the config.json of a model.

    Args:
        params: complete `model.params`, with all keys of ddconfig.

    Raises:
        ValueError: diffusers does not support the model; the message lists all reasons.
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
        # pipelines that use latents_mean also multiply by scaling_factor
        "scaling_factor": 1.0 if per_channel else latents.get("scale_factor", 1.0),
        "shift_factor": None if per_channel else latents.get("shift_factor") or None,
        "latents_mean": list(latents["mean"]) if per_channel else None,
        "latents_std": list(latents["std"]) if per_channel else None,
    }


def inexpressible(params: Mapping[str, Any]) -> list[str]:
    """Return the reasons why diffusers cannot express a model; empty if it can."""
    ddconfig, embed_dim = params["ddconfig"], params["embed_dim"]
    kind = "linear" if ddconfig["use_linear_attn"] else ddconfig["attn_type"]
    errors = []
    if kind not in ("vanilla", "none"):
        errors.append(f"attn_type={kind}: only softmax attention is supported")
    if embed_dim not in (None, ddconfig["z_channels"]):
        errors.append(f"embed_dim={embed_dim}: must equal z_channels={ddconfig['z_channels']}")
    if ddconfig["ch_mult"][0] != 1:
        errors.append(f"ch_mult={list(ddconfig['ch_mult'])}: the first level must have ch channels")
    if not ddconfig["resamp_with_conv"] and len(ddconfig["ch_mult"]) > 1:
        errors.append("resamp_with_conv=false: only resampling with convolutions is supported")
    if ddconfig["tanh_out"]:
        errors.append("tanh_out=true: a tanh after the decoder is not supported")
    if ddconfig["context_channels"]:
        errors.append(f"context_channels={ddconfig['context_channels']}: context is not supported")
    for key, only in (("norm_type", "group"), ("block_type", "resnet")):
        if ddconfig[key] != only:
            errors.append(f"{key}={ddconfig[key]}: only {only} is supported")
    return errors


class _Reader:
    """Typed access to the values of a config.json."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config = config
        self.source = source

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.config.get(key)
        if value is None:
            return default
        if not _is_type(kind, value):
            self.refuse(key, value, f"must be {_TYPES[kind]}")
        return float(value) if kind is float else value

    def refuse(self, key: str, value: object, why: str) -> NoReturn:
        raise ValueError(f"{self.source}: {key}={value!r:.80}: {why}")


def _is_type(kind: type, value: object) -> bool:
    if kind is float:  # or an integer; rejects NaN, infinity and integers above the float maximum
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
        if len(values) != z_channels or not all(_is_type(float, x) for x in values):
            reader.refuse(key, values, f"must be {z_channels} numbers (latent_channels)")
        if key == "latents_std" and min(values) <= 0:
            reader.refuse(key, values, "must be above 0")
    if mean is None or std is None:
        return {"scale_factor": scale, "shift_factor": reader.get("shift_factor", float, 0.0)}
    # diffusers pipelines compute (z - mean) * scaling_factor / std
    return {"mean": tuple(mean), "std": tuple(x / scale for x in std), "per_channel": True}


def _resolution(sample_size: object, levels: int) -> int:
    """Return `sample_size` if it is a valid resolution, otherwise a default."""
    size = sample_size[0] if isinstance(sample_size, list) and sample_size else sample_size
    f = 2 ** (levels - 1)
    return size if type(size) is int and size > 0 and size % f == 0 else max(256, f)
