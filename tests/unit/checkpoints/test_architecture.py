"""The architecture is inferred from tensors alone, or refused in words."""

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
    """The same from the tensors as from the config; and its `params` build the same tensors."""
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
def test_every_kind_is_inferred(keys: Config, embed_dim: int | None, shown: Config) -> None:
    architecture = assert_inferred(TINY_DDCONFIG | keys, embed_dim)
    assert {key: getattr(architecture, key) for key in shown} == shown


def test_without_double_z_there_is_one_moment(tensors: Tensors) -> None:
    """No AutoEncoderKL has it, so that its config is what refuses it."""
    tensors["encoder.conv_out.weight"] = empty(4, 64, 3, 3)
    assert not infer_architecture(tensors, "it").double_z


def test_tensors_of_a_loss_and_others_do_not_matter(tensors: Tensors) -> None:
    others = {"loss.logvar": empty(), "colorize": empty(3, 5, 1, 1), "x.down.0.block.0": empty()}
    assert infer_architecture(tensors | others, "it") == infer_architecture(tensors, "it")


def test_differences_are_shown_as_a_config_has_them() -> None:
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


IMAGES = "it: not an autoencoder of images: "
WHOLE = "it: not the whole of a KL autoencoder: "
LAYOUT = "[out, in, height, width]"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            reshaped("quantize.embedding.weight", 8, 3),
            "it: a VQ autoencoder, whose latents are entries of a codebook; kl_vae reads KL "
            "autoencoders",
        ),
        (
            reshaped("encoder.conv_in.weight", 32, 3, 3, 3, 3),
            f"{IMAGES}encoder.conv_in.weight has the shape [32, 3, 3, 3, 3], not {LAYOUT}",
        ),
        (
            reshaped("decoder.conv_out.weight", 3, 32, 3),
            f"{IMAGES}decoder.conv_out.weight has the shape [3, 32, 3], not {LAYOUT}",
        ),
        (
            reshaped("encoder.conv_in.weight"),
            f"{IMAGES}encoder.conv_in.weight has the shape [], not {LAYOUT}",
        ),
        (
            reshaped("encoder.conv_in.weight", 0, 3, 3, 3),
            f"{IMAGES}encoder.conv_in.weight has the shape [0, 3, 3, 3], not {LAYOUT}",
        ),
        (
            reshaped("post_quant_conv.weight", 4),
            f"{IMAGES}post_quant_conv.weight has the shape [4], not {LAYOUT}",
        ),
        (
            reshaped("quant_conv.weight", 6, 8, 1, 1, 1),
            f"{IMAGES}quant_conv.weight has the shape [6, 8, 1, 1, 1], not {LAYOUT}",
        ),
        (
            reshaped("encoder.mid.block_1.temb_proj.weight", 64),
            f"{IMAGES}encoder.mid.block_1.temb_proj.weight has the shape [64], not [out, in]",
        ),
        (
            reshaped("encoder.mid.block_1.temb_proj.weight"),
            f"{IMAGES}encoder.mid.block_1.temb_proj.weight has the shape [], not [out, in]",
        ),
        (
            without("decoder"),
            f"{WHOLE}no decoder.conv_in.weight among its tensors, 66 in all, such as "
            "encoder.conv_in.bias, "
            "encoder.conv_in.weight, encoder.conv_out.bias",
        ),
        (
            without("encoder"),
            f"{WHOLE}no encoder.conv_in.weight among its tensors, 92 in all, such as decoder.",
        ),
        (
            without("coder", "quant"),
            f"{WHOLE}no encoder.conv_in.weight among its tensors, 0 in all, such as none",
        ),
        (without("decoder.conv_out"), f"{WHOLE}no decoder.conv_out.weight among its"),
        (without("encoder.conv_out"), f"{WHOLE}no encoder.conv_out.weight among its"),
        (without("encoder.down"), f"{WHOLE}encoder.down has [] residual blocks in the levels []"),
        (without("up.0."), f"{WHOLE}decoder.up has [2] residual blocks in the levels [1]"),
        (
            renamed("encoder.down.1.", "encoder.down.2."),
            f"{WHOLE}encoder.down has [1, 1] residual blocks in the levels [0, 2]",
        ),
        (
            without("decoder.up.1.block.1."),
            f"{WHOLE}decoder.up has [2, 1] residual blocks in the levels [0, 1]",
        ),
        (
            renamed("encoder.down.1.block.0.", "encoder.down.1.block.1."),
            f"{WHOLE}encoder.down has [1, 1] residual blocks in the levels [0, 1]",
        ),
        (
            reshaped("encoder.down.5.attn.0.q.weight", 64, 64, 1, 1),
            f"{WHOLE}encoder.down has [1, 1] residual blocks in the levels [0, 1]",
        ),
        (
            reshaped("encoder.down.1.block.0.conv1.weight"),
            f"{WHOLE}encoder.down has [1, 1] residual blocks in the levels [0, 1]",
        ),
        (
            reshaped("decoder.up.1.block.0.conv1.weight", 96, 64, 3, 3),
            "it: its encoder has levels of (32, 64) channels, its decoder levels of (32, 96) "
            "channels: no ddconfig describes that",
        ),
        (
            without("decoder.up.1."),
            "it: its encoder has levels of (32, 64) channels, its decoder levels of (32,) channels",
        ),
        (
            without("up.1.attn", "up.0.attn"),
            "it: its encoder has attention in the levels (1,), its decoder attention in the levels "
            "(): no ddconfig describes that",
        ),
        (
            without("encoder.mid.attn_1"),
            "it: its encoder has attention of the kind none in the middle, its decoder attention "
            "of the kind vanilla in the middle: no ddconfig describes that",
        ),
        (
            without("up.0.block.1", "up.1.block.1"),
            "it: its encoder has 1 residual blocks a level, less the decoder's one more, its "
            "decoder 0 residual blocks a level",
        ),
        (
            without("mid.attn_1"),
            "it: has attention in the levels (1,) and none in the middle: no ddconfig describes "
            "that",
        ),
        (
            reshaped("encoder.conv_in.weight", 48, 3, 3, 3),
            "it: levels of (32, 64) channels are no multiples of the first convolution's 48: no "
            "ddconfig describes that",
        ),
    ],
)
def test_what_no_ddconfig_describes_is_refused(
    tensors: Tensors, change: Callable[[Tensors], None], error: str
) -> None:
    change(tensors)
    with pytest.raises(ValueError) as caught:
        infer_architecture(tensors, "it")
    assert str(caught.value).startswith(error)
    assert "\n" not in str(caught.value)


def test_levels_without_end_are_refused(tensors: Tensors) -> None:
    """As many as tensors, which are cheap: a resolution of 2 ** 100000 is not."""
    kernel = empty(32, 32, 3, 3)
    names = ("encoder.down.{}.block.0", "decoder.up.{}.block.0", "decoder.up.{}.block.1")
    for level in range(2, MAX_LEVELS + 1):
        tensors |= {f"{name.format(level)}.conv1.weight": kernel for name in names}
    with pytest.raises(ValueError, match=r"^it: encoder\.down has 33 levels, more than 32$"):
        infer_architecture(tensors, "it")
    without(f".{MAX_LEVELS}.")(tensors)
    assert len(infer_architecture(tensors, "it").params()["ddconfig"]["ch_mult"]) == MAX_LEVELS


@pytest.mark.parametrize("digits", [5, 9999])
def test_a_level_of_many_digits_is_no_level(tensors: Tensors, digits: int) -> None:
    tensors[f"decoder.up.{'9' * digits}.block.0.conv1.weight"] = empty(32, 32, 3, 3)
    assert infer_architecture(tensors, "it") == said(TINY_DDCONFIG, 3)


def test_no_tensors_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="^it: not the whole of a KL autoencoder: no encoder.conv"):
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
        assert str(error).startswith("it: ")
    else:
        assert architecture.differences(architecture) == ""
        architecture.params()
    # a model that is given them says what does not fit, and nothing else
    if tensors.keys() != _TINY.keys() or any(x.shape != _TINY[k].shape for k, x in tensors.items()):
        with pytest.raises(ValueError, match="(?s)^it: .*; use the config it was trained with"):
            match(_TINY, tensors, source="it")


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"ch": 64}, "its tensors have ch=32 (not 64)"),
        ({"num_res_blocks": 2, "z_channels": 8}, "num_res_blocks=1 (not 2), z_channels=4 (not 8)"),
        ({"attn_resolutions": []}, "its tensors have attention_levels=[1] (not [])"),
        ({"in_channels": 1, "out_ch": 1}, "its tensors have in_channels=3 (not 1), out_ch=3 (not"),
    ],
)
def test_a_mismatch_is_told_as_the_keys_of_the_config(
    tensors: Tensors, keys: Config, error: str
) -> None:
    with pytest.raises(ValueError, match="^it: its .*; use the config it was trained with$") as e:
        match(on_meta(TINY_DDCONFIG | keys, 3), tensors, source="it")
    assert error in str(e.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            reshaped("encoder.norm_out.bias", 7),
            "1 tensors of another shape (encoder.norm_out.bias: [7] in the file, [64] in the ",
        ),
        (without("norm_out"), "4 missing (such as encoder.norm_out.weight)"),
        (reshaped("x", 1), "1 unexpected (such as x)"),
        (without("decoder.up.1"), "38 missing (such as decoder.up.1.block.0.norm1.weight)"),
    ],
)
def test_a_mismatch_of_single_tensors_is_told_by_their_names(
    tensors: Tensors, change: Callable[[Tensors], None], error: str
) -> None:
    own = dict(tensors)
    change(tensors)
    with pytest.raises(ValueError, match="^it: .*, or name them in ignore_keys$") as caught:
        match(own, tensors, source="it")
    assert error in str(caught.value)
