"""diffusers' names of an autoencoder's tensors, as one table, both ways.

The layouts differ in names, in the order of the decoder's levels (diffusers counts from the lowest
resolution), and in attention's weights ([C, C] there, [C, C, 1, 1] here).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

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
