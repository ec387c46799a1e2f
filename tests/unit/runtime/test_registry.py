"""Registered names, and parts of the user's own in a ddconfig."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae import (
    AutoEncoderKL,
    register_attention,
    register_block,
    register_normalization,
)
from kl_vae.attention import VanillaAttention
from kl_vae.blocks import ResnetBlock
from kl_vae.runtime.registry import Registry
from tests.messages import mentions


def test_a_name_stands_for_what_was_registered_under_it() -> None:
    registry = Registry("kind")
    assert registry.register("b")(list) is list
    registry.register("a")(dict)
    assert registry["b"] is list
    assert list(registry) == ["a", "b"]
    assert "a" in registry
    assert "c" not in registry


def test_a_name_may_be_registered_again_only_for_the_same_object() -> None:
    registry = Registry("kind")
    registry.register("a")(dict)
    registry.register("a")(dict)
    with pytest.raises(ValueError, match=mentions("kind='a'", "registered")):
        registry.register("a")(list)
    assert registry["a"] is dict


def test_an_unknown_name_is_an_error_that_names_the_choices() -> None:
    registry = Registry("kind")
    registry.register("b")(list)
    registry.register("a")(dict)
    with pytest.raises(ValueError, match=mentions("kind='c'", "a, b")):
        registry["c"]


def test_a_custom_attention_is_used_at_every_place(
    tiny_ddconfig: dict[str, Any],
) -> None:
    @register_attention("twice")
    class Twice(VanillaAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model = AutoEncoderKL(tiny_ddconfig | {"attn_type": "twice"}, 3)
    places = [name for name, module in model.named_modules() if isinstance(module, Twice)]
    assert places == [
        "encoder.down.1.attn.0",
        "encoder.mid.attn_1",
        "decoder.mid.attn_1",
        "decoder.up.1.attn.0",
        "decoder.up.1.attn.1",
    ]
    assert model(torch.zeros(1, 3, 16, 16))[0].shape == (1, 3, 16, 16)


def test_a_custom_norm_replaces_every_group_norm(tiny_ddconfig: dict[str, Any]) -> None:
    register_normalization("batch")(nn.BatchNorm2d)
    # 32 groups are then not asked of the channels
    model = AutoEncoderKL(tiny_ddconfig | {"norm_type": "batch", "ch": 20}, 3)
    kinds = [type(module) for module in model.modules()]
    assert nn.GroupNorm not in kinds
    assert kinds.count(nn.BatchNorm2d) == 2 * (4 + 6) + 5 + 2  # blocks, attention, norm_out
    assert model(torch.rand(2, 3, 16, 16))[0].shape == (2, 3, 16, 16)


def test_a_custom_block_gets_the_values_of_the_ddconfig(tiny_ddconfig: dict[str, Any]) -> None:
    given: list[dict[str, Any]] = []

    @register_block("noted")
    class Noted(ResnetBlock):
        def __init__(self, in_channels: int, out_channels: int, **shared: Any) -> None:
            super().__init__(in_channels, out_channels, **shared)
            given.append(dict(shared))

    keys = {"block_type": "noted", "dropout": 0.25, "context_channels": 5}
    model = AutoEncoderKL(tiny_ddconfig | keys, 3)
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock)]
    assert {type(block) for block in blocks} == {Noted}
    assert len(blocks) == len(given) == 10
    for keywords in given:
        assert keywords.pop("norm")(32).num_groups == 32
        assert keywords == {"dropout": 0.25, "context_channels": 5}
