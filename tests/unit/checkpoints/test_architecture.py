"""Infer the architecture from tensors alone, or raise an error."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.architecture import MAX_LEVELS, Architecture, infer_architecture
from kl_vae.checkpoints.pretrained import match
from kl_vae.ddconfig import DDConfig
from tests.conftest import TINY_DDCONFIG
from tests.messages import is_about, mentions

Config = dict[str, Any]
Tensors = dict[str, Tensor]
PUBLISHED = sorted((Path(__file__).parents[3] / "configs").glob("*-published.yaml"))


def on_meta(ddconfig: Config, embed_dim: int | None) -> Tensors:
    with torch.device("meta"):
        return AutoEncoderKL(ddconfig, embed_dim).state_dict()


def said(ddconfig: Config, embed_dim: int | None) -> Architecture:
    return Architecture.of_params(dataclasses.asdict(DDConfig.from_dict(ddconfig)), embed_dim)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.fixture
def tensors() -> Tensors:
    return on_meta(TINY_DDCONFIG, 3)


def assert_inferred(ddconfig: Config, embed_dim: int | None) -> Architecture:
    """The tensors and the config give the same architecture, whose `params` build the tensors."""
    own = on_meta(ddconfig, embed_dim)
    architecture = infer_architecture(own, "it")
    assert architecture == said(ddconfig, embed_dim)
    params = architecture.params()
    assert params["embed_dim"] == embed_dim
    groups = {"norm_groups": ddconfig.get("norm_groups", 32)}  # no tensor shows it
    again = on_meta(params["ddconfig"] | groups, params["embed_dim"])
    assert {key: x.shape for key, x in again.items()} == {key: x.shape for key, x in own.items()}
    return architecture


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_autoencoders_are_inferred(path: Path) -> None:
    params = yaml.safe_load(path.read_text())["model"]["params"]
    architecture = assert_inferred(params["ddconfig"], params["embed_dim"])
    inferred = architecture.params()["ddconfig"]
    assert DDConfig.from_dict(inferred) == DDConfig.from_dict(params["ddconfig"])


def test_four_configs_are_published() -> None:
    assert len(PUBLISHED) == 4


@pytest.mark.parametrize(
    ("keys", "embed_dim", "shown"),
    [
        ({}, 3, {"ch": 32, "ch_mult": (1, 2), "attention_levels": (1,), "embed_dim": 3}),
        ({"z_channels": 16}, None, {"z_channels": 16, "embed_dim": None}),
        ({"attn_type": "linear"}, 3, {"attn_type": "linear", "attention_levels": (1,)}),
        ({"use_linear_attn": True}, 3, {"attn_type": "linear"}),
        ({"attn_type": "none"}, 3, {"attn_type": "none", "attention_levels": ()}),
        ({"attn_resolutions": []}, 3, {"attn_type": "vanilla", "attention_levels": ()}),
        ({"attn_resolutions": [8, 16]}, 3, {"attention_levels": (0, 1)}),
        (
            {"ch_mult": [1, 1, 2, 2], "attn_resolutions": [4, 16]},
            3,
            {"attention_levels": (0, 2)},
        ),
        ({"ch_mult": [1], "attn_resolutions": []}, 3, {"ch_mult": (1,), "resamp_with_conv": True}),
        ({"ch_mult": [1], "attn_resolutions": [16], "resamp_with_conv": False}, 3, {}),
        ({"resamp_with_conv": False}, 3, {"resamp_with_conv": False}),
        ({"context_channels": 5}, 3, {"context_channels": 5}),
        ({"in_channels": 1, "out_ch": 1}, 1, {"in_channels": 1, "out_ch": 1}),
        ({"ch_mult": [2, 4]}, 3, {"ch": 32, "ch_mult": (2, 4)}),
        ({"ch_mult": [4, 2, 1]}, 3, {"ch_mult": (4, 2, 1)}),
        ({"num_res_blocks": 3}, 3, {"num_res_blocks": 3}),
        ({"z_channels": 1}, 1, {"z_channels": 1, "double_z": True}),
        ({"ch": 4, "norm_groups": 2}, 64, {"ch": 4, "embed_dim": 64}),
        (
            {"ch_mult": [1] * 10, "resolution": 512, "attn_resolutions": [1, 512]},
            3,
            {"ch_mult": (1,) * 10, "attention_levels": (0, 9)},
        ),
        ({"ch_mult": [1] * 12, "resolution": 2048, "attn_resolutions": [1, 2]}, 3, {}),
    ],
)
def test_each_architecture_is_inferred(keys: Config, embed_dim: int | None, shown: Config) -> None:
    architecture = assert_inferred(TINY_DDCONFIG | keys, embed_dim)
    assert {key: getattr(architecture, key) for key in shown} == shown


def test_double_z_is_inferred(tensors: Tensors) -> None:
    """No AutoEncoderKL has `double_z=False`; its config raises the error."""
    tensors["encoder.conv_out.weight"] = empty(4, 64, 3, 3)
    assert not infer_architecture(tensors, "it").double_z


def test_tensors_of_other_modules_are_ignored(tensors: Tensors) -> None:
    others = {"loss.logvar": empty(), "colorize": empty(3, 5, 1, 1), "x.down.0.block.0": empty()}
    assert infer_architecture(tensors | others, "it") == infer_architecture(tensors, "it")


def test_differences_are_named_by_config_key() -> None:
    one = said(TINY_DDCONFIG, None)
    assert one.differences(one) == ""
    keys = {"ch": 64, "ch_mult": [1, 2, 2], "attn_type": "none", "resamp_with_conv": False}
    other = said(TINY_DDCONFIG | keys, 3)
    assert one.differences(other) == (
        "ch=32 (not 64), ch_mult=[1, 2] (not [1, 2, 2]), attention_levels=[1] (not []), "
        "attn_type=vanilla (not none), embed_dim=null (not 3), resamp_with_conv=True (not False)"
    )


def without(*parts: str) -> Callable[[Tensors], None]:
    def drop(tensors: Tensors) -> None:
        for key in [key for key in tensors if any(part in key for part in parts)]:
            del tensors[key]

    return drop


def reshaped(key: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: empty(*shape)})


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def rename(tensors: Tensors) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return rename


LAYOUT = "[out, in, height, width]"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (reshaped("quantize.embedding.weight", 8, 3), ("VQ", "KL")),
        (
            reshaped("encoder.conv_in.weight", 32, 3, 3, 3, 3),
            ("encoder.conv_in.weight", "[32, 3, 3, 3, 3]", LAYOUT),
        ),
        (
            reshaped("decoder.conv_out.weight", 3, 32, 3),
            ("decoder.conv_out.weight", "[3, 32, 3]", LAYOUT),
        ),
        (reshaped("encoder.conv_in.weight"), ("encoder.conv_in.weight", "[]", LAYOUT)),
        (
            reshaped("encoder.conv_in.weight", 0, 3, 3, 3),
            ("encoder.conv_in.weight", "[0, 3, 3, 3]", LAYOUT),
        ),
        (reshaped("post_quant_conv.weight", 4), ("post_quant_conv.weight", "[4]", LAYOUT)),
        (
            reshaped("quant_conv.weight", 6, 8, 1, 1, 1),
            ("quant_conv.weight", "[6, 8, 1, 1, 1]", LAYOUT),
        ),
        (
            reshaped("encoder.mid.block_1.temb_proj.weight", 64),
            ("encoder.mid.block_1.temb_proj.weight", "[64]", "[out, in]"),
        ),
        (
            reshaped("encoder.mid.block_1.temb_proj.weight"),
            ("encoder.mid.block_1.temb_proj.weight", "[]", "[out, in]"),
        ),
        (
            without("decoder"),
            (
                *("decoder.conv_in.weight", 66),
                "encoder.conv_in.bias, encoder.conv_in.weight, encoder.conv_out.bias",
            ),
        ),
        (without("encoder"), ("encoder.conv_in.weight", 92, "decoder.conv_in.bias")),
        (without("coder", "quant"), ("encoder.conv_in.weight", 0)),
        (without("decoder.conv_out"), ("decoder.conv_out.weight",)),
        (without("encoder.conv_out"), ("encoder.conv_out.weight",)),
        (without("encoder.down"), ("encoder.down", "[]")),
        (without("up.0."), ("decoder.up", "[2]", "[1]")),
        (renamed("encoder.down.1.", "encoder.down.2."), ("encoder.down", "[1, 1]", "[0, 2]")),
        (without("decoder.up.1.block.1."), ("decoder.up", "[2, 1]", "[0, 1]")),
        (
            renamed("encoder.down.1.block.0.", "encoder.down.1.block.1."),
            ("encoder.down", "[1, 1]", "[0, 1]"),
        ),
        (
            reshaped("encoder.down.5.attn.0.q.weight", 64, 64, 1, 1),
            ("encoder.down", "[1, 1]", "[0, 1]"),
        ),
        (
            reshaped("encoder.down.1.block.0.conv1.weight"),
            ("encoder.down", "[1, 1]", "[0, 1]"),
        ),
        (
            reshaped("decoder.up.1.block.0.conv1.weight", 96, 64, 3, 3),
            ("encoder", "(32, 64)", "decoder", "(32, 96)", "channels", "ddconfig"),
        ),
        (
            without("decoder.up.1."),
            ("encoder", "(32, 64)", "decoder", "(32,)", "channels", "ddconfig"),
        ),
        (
            without("up.1.attn", "up.0.attn"),
            ("encoder", "(1,)", "decoder", "()", "attention", "ddconfig"),
        ),
        (
            without("encoder.mid.attn_1"),
            ("encoder", "none", "decoder", "vanilla", "attention", "ddconfig"),
        ),
        (
            without("up.0.block.1", "up.1.block.1"),
            ("num_res_blocks=1", "num_res_blocks=0", "ddconfig"),
        ),
        (without("mid.attn_1"), ("attention", "(1,)", "ddconfig")),
        (reshaped("encoder.conv_in.weight", 48, 3, 3, 3), ("(32, 64)", 48, "ddconfig")),
    ],
)
def test_tensors_that_no_ddconfig_describes_are_an_error(
    tensors: Tensors, change: Callable[[Tensors], None], parts: tuple[object, ...]
) -> None:
    change(tensors)
    with pytest.raises(ValueError, match=mentions("it:", *parts)) as caught:
        infer_architecture(tensors, "it")
    assert "\n" not in str(caught.value)


def test_too_many_levels_are_an_error(tensors: Tensors) -> None:
    """Each level would double the resolution of the config."""
    kernel = empty(32, 32, 3, 3)
    names = ("encoder.down.{}.block.0", "decoder.up.{}.block.0", "decoder.up.{}.block.1")
    for level in range(2, MAX_LEVELS + 1):
        tensors |= {f"{name.format(level)}.conv1.weight": kernel for name in names}
    with pytest.raises(ValueError, match=mentions("it:", "encoder.down", 33, 32)):
        infer_architecture(tensors, "it")
    without(f".{MAX_LEVELS}.")(tensors)
    assert len(infer_architecture(tensors, "it").params()["ddconfig"]["ch_mult"]) == MAX_LEVELS


@pytest.mark.parametrize("digits", [5, 9999])
def test_a_level_of_many_digits_is_ignored(tensors: Tensors, digits: int) -> None:
    tensors[f"decoder.up.{'9' * digits}.block.0.conv1.weight"] = empty(32, 32, 3, 3)
    assert infer_architecture(tensors, "it") == said(TINY_DDCONFIG, 3)


def test_an_empty_state_dict_is_an_error() -> None:
    with pytest.raises(ValueError, match=mentions("it:", "encoder.conv_in.weight", 0)):
        infer_architecture({}, "it")


_TINY = on_meta(TINY_DDCONFIG | {"context_channels": 2}, 3)
_keys = (
    st.sampled_from(sorted(_TINY))
    | st.text(max_size=20)
    | st.from_regex(
        r"(encoder\.down|decoder\.up|encoder\.mid|quantize)\.\d{1,3}\.(block|attn)\.\d{1,3}\."
        r"(conv1|q|norm1)\.weight",
        fullmatch=True,
    )
)
_shapes = st.lists(st.integers(0, 64), max_size=5)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dropped=st.lists(st.sampled_from(sorted(_TINY)), max_size=4),
    changed=st.dictionaries(_keys, _shapes, max_size=4),
)
def test_any_dict_of_tensors_is_inferred_or_a_value_error(
    dropped: list[str], changed: dict[str, list[int]]
) -> None:
    tensors = {key: x for key, x in _TINY.items() if key not in dropped}
    tensors |= {key: empty(*shape) for key, shape in changed.items()}
    try:
        architecture = infer_architecture(tensors, "it")
    except ValueError as error:
        assert is_about(str(error), "it:")
    else:
        assert architecture.differences(architecture) == ""
        architecture.params()
    # loading them into a model reports what does not fit
    if tensors.keys() != _TINY.keys() or any(x.shape != _TINY[k].shape for k, x in tensors.items()):
        with pytest.raises(ValueError, match=mentions("it:", "config")):
            match(_TINY, tensors, source="it")


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"ch": 64}, ("ch=32", 64)),
        ({"num_res_blocks": 2, "z_channels": 8}, ("num_res_blocks=1", 2, "z_channels=4", 8)),
        ({"attn_resolutions": []}, ("attention_levels=[1]", "[]")),
        ({"in_channels": 1, "out_ch": 1}, ("in_channels=3", "out_ch=3", 1)),
    ],
)
def test_a_mismatch_names_the_config_keys(
    tensors: Tensors, keys: Config, parts: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=mentions("it:", *parts, "config")):
        match(on_meta(TINY_DDCONFIG | keys, 3), tensors, source="it")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (reshaped("encoder.norm_out.bias", 7), (1, "encoder.norm_out.bias", "[7]", "[64]")),
        (without("norm_out"), (4, "missing", "encoder.norm_out.weight")),
        (reshaped("x", 1), (1, "unexpected", "x")),
        (without("decoder.up.1"), (38, "missing", "decoder.up.1.block.0.norm1.weight")),
    ],
)
def test_a_mismatch_of_single_tensors_names_them(
    tensors: Tensors, change: Callable[[Tensors], None], parts: tuple[object, ...]
) -> None:
    own = dict(tensors)
    change(tensors)
    with pytest.raises(ValueError, match=mentions("it:", *parts, "ignore_keys")):
        match(own, tensors, source="it")
