"""Rename tensors to the names of diffusers and back."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.diffusers import (
    from_diffusers,
    is_diffusers,
    to_diffusers,
    with_published_attention,
)
from tests.conftest import TINY_DDCONFIG

Tensors = dict[str, Tensor]

ARCHITECTURES: list[tuple[dict[str, Any], int | None]] = [
    ({}, 4),
    ({"ch_mult": [1, 2, 2], "attn_resolutions": [4, 16], "num_res_blocks": 2}, 4),
    ({"attn_resolutions": []}, None),
    ({"attn_type": "none", "attn_resolutions": []}, None),
    ({"ch_mult": [1], "attn_resolutions": []}, 4),
    ({"ch_mult": [1] * 11, "resolution": 1024, "attn_resolutions": [1, 1024]}, 4),
    ({"ch_mult": [1, 2], "num_res_blocks": 11}, 4),
]
# names in diffusers up to 0.14
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def own(keys: dict[str, Any], embed_dim: int | None) -> Tensors:
    """Random tensors of a small model."""
    small = TINY_DDCONFIG | {"ch": 2, "norm_groups": 2} | keys
    torch.manual_seed(0)
    return {
        key: torch.randn(x.shape) for key, x in AutoEncoderKL(small, embed_dim).state_dict().items()
    }


def theirs(keys: dict[str, Any], embed_dim: int | None) -> Any:
    diffusers = pytest.importorskip("diffusers")
    config = TINY_DDCONFIG | {"ch": 2} | keys
    levels = range(len(config["ch_mult"]))
    attention = [config["resolution"] >> level in config["attn_resolutions"] for level in levels]
    with torch.device("meta"):
        return diffusers.AutoencoderKL(
            down_block_types=["Attn" * a + "DownEncoderBlock2D" for a in attention],
            up_block_types=["Attn" * a + "UpDecoderBlock2D" for a in attention[::-1]],
            block_out_channels=[config["ch"] * multiple for multiple in config["ch_mult"]],
            layers_per_block=config["num_res_blocks"],
            norm_num_groups=2,
            use_quant_conv=embed_dim is not None,
            use_post_quant_conv=embed_dim is not None,
            mid_block_add_attention=config.get("attn_type") != "none",
        )


def assert_same(ours: Tensors, others: Tensors) -> None:
    assert ours.keys() == others.keys()
    assert all(torch.equal(x, others[key]) for key, x in ours.items())


@pytest.mark.filterwarnings("ignore")  # of packages that diffusers looks for
@pytest.mark.parametrize(("keys", "embed_dim"), ARCHITECTURES)
def test_the_names_and_shapes_are_those_of_diffusers(
    keys: dict[str, Any], embed_dim: int | None
) -> None:
    shapes = {key: x.shape for key, x in to_diffusers(own(keys, embed_dim)).items()}
    assert shapes == {key: x.shape for key, x in theirs(keys, embed_dim).state_dict().items()}


@pytest.mark.parametrize(("keys", "embed_dim"), ARCHITECTURES)
def test_round_trip_is_exact(keys: dict[str, Any], embed_dim: int | None) -> None:
    tensors = own(keys, embed_dim)
    renamed = to_diffusers(tensors)
    assert is_diffusers(renamed) and not is_diffusers(tensors)
    assert_same(from_diffusers(renamed), tensors)
    assert_same(to_diffusers(from_diffusers(renamed)), renamed)


def with_old_names(tensors: Tensors) -> Tensors:
    renamed = {}
    for key, x in tensors.items():
        for new, old in OLD.items():
            key = re.sub(rf"(attentions\.\d+)\.{re.escape(new)}\.", rf"\1.{old}.", key)
        renamed[key] = x
    return renamed


@pytest.mark.parametrize(("keys", "embed_dim"), ARCHITECTURES)
def test_old_names_are_read(keys: dict[str, Any], embed_dim: int | None) -> None:
    tensors = own(keys, embed_dim)
    old = with_old_names(to_diffusers(tensors))
    assert any("attentions.0.query.weight" in key for key in old) == (keys.get("attn_type") is None)
    assert_same(from_diffusers(old), tensors)


@pytest.mark.filterwarnings("ignore")
def test_old_names_match_diffusers() -> None:
    """Its own conversion turns our old names into its new ones."""
    keys, embed_dim = ARCHITECTURES[1]
    named = to_diffusers(own(keys, embed_dim))
    old = with_old_names(named)
    model = theirs(keys, embed_dim)
    model._fix_state_dict_keys_on_load(old)
    assert_same(old, named)


def test_decoder_levels_are_reversed() -> None:
    tensors = {
        f"decoder.up.{i}.block.0.conv1.weight": torch.full((1,), float(i)) for i in range(12)
    }
    renamed = to_diffusers(tensors)
    for i in range(12):
        key = f"decoder.up_blocks.{11 - i}.resnets.0.conv1.weight"
        assert torch.equal(renamed[key], tensors[f"decoder.up.{i}.block.0.conv1.weight"])


@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
        ("encoder.norm_out.bias", "encoder.conv_norm_out.bias"),
        ("encoder.conv_out.bias", "encoder.conv_out.bias"),
        ("encoder.down.3.downsample.conv.bias", "encoder.down_blocks.3.downsamplers.0.conv.bias"),
        ("encoder.down.1.attn.0.norm.bias", "encoder.down_blocks.1.attentions.0.group_norm.bias"),
        ("encoder.mid.attn_1.proj_out.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
        ("encoder.mid.block_2.norm1.bias", "encoder.mid_block.resnets.1.norm1.bias"),
        (
            "encoder.down.1.block.0.nin_shortcut.bias",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        ),
        ("decoder.up.0.upsample.conv.bias", "decoder.up_blocks.0.upsamplers.0.conv.bias"),
        ("quant_conv.weight", "quant_conv.weight"),
        ("colorize", "colorize"),
        ("loss.logvar", "loss.logvar"),
        ("loss.encoder.mid.block_1.norm1.bias", "loss.encoder.mid.block_1.norm1.bias"),
        ("", ""),
        ("encoder.down.x.block.0.norm1.bias", "encoder.down.x.block.0.norm1.bias"),
        ("encoder.mid.block_1.norm.to_q.bias", "encoder.mid_block.resnets.0.norm.to_q.bias"),
    ],
)
def test_single_names(ours: str, others: str) -> None:
    """Keys that no rule matches are unchanged."""
    x = torch.zeros(1)
    assert to_diffusers({ours: x}).keys() == {others}
    assert from_diffusers({others: x}).keys() == {ours}


def test_attention_weights_gain_and_lose_kernel_axes() -> None:
    named = to_diffusers({"encoder.mid.attn_1.q.weight": torch.ones(2, 2, 1, 1)})
    assert {key: list(x.shape) for key, x in named.items()} == {
        "encoder.mid_block.attentions.0.to_q.weight": [2, 2]
    }
    flat = {"encoder.mid.attn_1.q.weight": torch.ones(2, 2), "encoder.x.weight": torch.ones(2, 2)}
    assert [x.ndim for x in with_published_attention(flat).values()] == [4, 2]
    # the first layout of diffusers and unexpected shapes are unchanged
    whole = {f"decoder.up.12.attn.0.{n}.weight": torch.ones(2, 2, 1, 1) for n in ("q", "proj_out")}
    assert_same(with_published_attention(whole), whole)
    odd = {
        "decoder.mid.attn_1.k.weight": torch.ones(()),
        "decoder.mid.attn_1.k.bias": torch.ones(2),
    }
    assert_same(with_published_attention(odd), odd)


@pytest.mark.parametrize(
    ("key", "is_theirs"),
    [
        ("decoder.up_blocks.0.resnets.0.norm1.weight", True),
        ("encoder.mid_block.resnets.0.norm1.weight", True),
        ("encoder.down_blocks.0.x", True),
        ("encoder.conv_in.weight", False),
        ("encoder.down.0.block.0.norm1.weight", False),
        ("mid_block.resnets.0.norm1.weight", False),
        ("loss.encoder.mid_block.x", False),
    ],
)
def test_the_layout_is_detected_by_its_keys(key: str, is_theirs: bool) -> None:
    assert is_diffusers([key]) == is_theirs
    assert not is_diffusers([])


@pytest.mark.parametrize("digits", [5, 30, 9999])
def test_a_level_of_many_digits_is_ignored(digits: int) -> None:
    """int() raises an error for thousands of digits, and that error does not name the key."""
    key = f"decoder.up_blocks.{'9' * digits}.resnets.0.norm1.bias"
    tensors = {key: torch.zeros(1), "decoder.up_blocks.1.resnets.0.norm1.bias": torch.zeros(1)}
    assert from_diffusers(tensors).keys() == {key, "decoder.up.0.block.0.norm1.bias"}
