"""The keys of the ddconfig and the errors of invalid values."""

from typing import Any

import pytest
import torch
from torch import nn

from kl_vae import DDConfig, Decoder, Encoder
from kl_vae.attention import LinearAttention, VanillaAttention
from kl_vae.blocks import ResnetBlock
from tests.messages import is_about, mentions

Config = dict[str, Any]


def kinds(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Where in `module` an instance of `kind` stands."""
    return [name for name, child in module.named_modules() if isinstance(child, kind)]


def test_channels_follow_ch_and_ch_mult(tiny_ddconfig: Config) -> None:
    encoder = Encoder(**tiny_ddconfig | {"ch": 64, "ch_mult": [1, 3, 2], "attn_resolutions": []})
    widths = [level.block[0].conv2.out_channels for level in encoder.down]
    assert widths == [64, 192, 128]
    assert encoder.conv_in.out_channels == 64
    assert encoder.mid.block_1.conv1.in_channels == 128


def test_num_res_blocks_counts_the_encoders_and_the_decoder_has_one_more(
    tiny_ddconfig: Config,
) -> None:
    config = tiny_ddconfig | {"num_res_blocks": 2}
    assert [len(level.block) for level in Encoder(**config).down] == [2, 2]
    assert [len(level.block) for level in Decoder(**config).up] == [3, 3]


def test_in_channels_out_ch_and_z_channels_are_those_of_input_and_output(
    tiny_ddconfig: Config,
) -> None:
    config = tiny_ddconfig | {"in_channels": 5, "out_ch": 7, "z_channels": 6}
    assert Encoder(**config)(torch.zeros(2, 5, 16, 16)).shape == (2, 12, 8, 8)
    assert Decoder(**config)(torch.zeros(2, 6, 8, 8)).shape == (2, 7, 16, 16)


def test_attn_resolutions_place_attention_after_every_block_of_their_levels(
    tiny_ddconfig: Config,
) -> None:
    config = tiny_ddconfig | {"ch_mult": [1, 1, 1], "attn_resolutions": [16, 4]}
    encoder, decoder = Encoder(**config), Decoder(**config)
    assert kinds(encoder, VanillaAttention) == ["down.0.attn.0", "down.2.attn.0", "mid.attn_1"]
    assert kinds(decoder, VanillaAttention) == [
        "mid.attn_1",
        *("up.0.attn.0", "up.0.attn.1", "up.2.attn.0", "up.2.attn.1"),
    ]


def test_resolution_says_which_level_attn_resolutions_mean(tiny_ddconfig: Config) -> None:
    encoder = Encoder(**tiny_ddconfig | {"resolution": 8})
    assert kinds(encoder, VanillaAttention) == ["down.0.attn.0", "mid.attn_1"]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({}, VanillaAttention),
        ({"attn_type": "vanilla"}, VanillaAttention),
        ({"attn_type": "linear"}, LinearAttention),
        ({"use_linear_attn": True}, LinearAttention),
    ],
)
def test_attn_type_selects_the_kind_everywhere(
    tiny_ddconfig: Config, keys: Config, kind: type[nn.Module]
) -> None:
    assert kinds(Encoder(**tiny_ddconfig | keys), kind) == ["down.1.attn.0", "mid.attn_1"]


def test_attn_type_none_leaves_no_parameters_of_attention(tiny_ddconfig: Config) -> None:
    decoder = Decoder(**tiny_ddconfig | {"attn_type": "none"})
    assert not [name for name, _ in decoder.named_parameters() if "attn" in name]
    assert isinstance(decoder.mid.attn_1, nn.Identity)


@pytest.mark.parametrize("module", [Encoder, Decoder])
def test_dropout_acts_in_every_block_while_training(
    tiny_ddconfig: Config, module: type[nn.Module]
) -> None:
    network = module(**tiny_ddconfig | {"dropout": 0.25})
    blocks = [child for child in network.modules() if isinstance(child, ResnetBlock)]
    assert len(blocks) == (4 if module is Encoder else 6)
    assert {block.dropout.p for block in blocks} == {0.25}
    x = torch.rand(1, 3 if module is Encoder else 4, 16, 16)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_resamp_with_conv_false_leaves_no_parameters_of_resampling(tiny_ddconfig: Config) -> None:
    for network in (Encoder, Decoder):
        names = [name for name, _ in network(**tiny_ddconfig).named_parameters()]
        plain = network(**tiny_ddconfig | {"resamp_with_conv": False})
        plain_names = [name for name, _ in plain.named_parameters()]
        dropped = set(names) - set(plain_names)
        assert {name.split(".", 2)[2] for name in dropped} in (
            {"downsample.conv.weight", "downsample.conv.bias"},
            {"upsample.conv.weight", "upsample.conv.bias"},
        )


def test_tanh_out_is_the_tanh_of_the_image(tiny_ddconfig: Config) -> None:
    plain, bounded = Decoder(**tiny_ddconfig), Decoder(**tiny_ddconfig | {"tanh_out": True})
    bounded.load_state_dict(plain.state_dict())
    z = 50.0 * torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(bounded(z), plain(z).tanh())
    assert bounded(z).abs().max() <= 1.0


def test_give_pre_end_gives_the_features_before_the_last_norm(tiny_ddconfig: Config) -> None:
    plain, features = Decoder(**tiny_ddconfig), Decoder(**tiny_ddconfig | {"give_pre_end": True})
    features.load_state_dict(plain.state_dict())
    z = torch.randn(1, 4, 8, 8)
    assert features(z).shape == (1, 32, 16, 16)
    image = plain.conv_out(nn.functional.silu(plain.norm_out(features(z))))
    torch.testing.assert_close(image, plain(z))


def test_double_z_false_gives_z_channels(tiny_ddconfig: Config) -> None:
    encoder = Encoder(**tiny_ddconfig | {"double_z": False})
    assert encoder(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)


def test_context_channels_let_a_context_act_in_every_block(tiny_ddconfig: Config) -> None:
    encoder = Encoder(**tiny_ddconfig | {"context_channels": 6})
    blocks = [name for name in kinds(encoder, nn.Linear) if name.endswith("temb_proj")]
    assert len(blocks) == 4
    x, context = torch.zeros(2, 3, 16, 16), torch.randn(2, 6)
    first, second = encoder(x, context)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"chh": 1}, ("chh=1", "ch")),
        ({"ch": "32"}, ("ch='32'",)),
        ({"ch": "1e-2"}, ("ch='1e-2'",)),
        ({"ch": True}, ("ch=True",)),
        ({"ch_mult": 2}, ("ch_mult=2", "list")),
        ({"ch_mult": [1, 2.5]}, ("ch_mult[1]=2.5",)),
        ({"ch_mult": []}, ("ch_mult=[]",)),
        ({"ch_mult": [1, 0]}, ("ch_mult=[1, 0]",)),
        ({"num_res_blocks": 0}, ("num_res_blocks=0", 1)),
        ({"z_channels": -4}, ("z_channels=-4", 1)),
        ({"dropout": 1.0}, ("dropout=1.0",)),
        ({"dropout": "1e1"}, ("dropout=10.0",)),
        ({"dropout": float("nan")}, ("dropout=nan",)),
        ({"context_channels": -1}, ("context_channels=-1", 0)),
        (
            {"ch": 48, "ch_mult": [1, 2]},
            ("ch=48", "channels 48", 32, "norm_groups=24"),
        ),
        (
            {"ch": 16, "ch_mult": [2, 4]},
            ("ch=16", "channels 16", 32, "norm_groups=8"),
        ),
        (
            {"attn_resolutions": [32]},
            ("attn_resolutions=[32]", "16, 8"),
        ),
        (
            {"resolution": 17, "attn_resolutions": []},
            ("resolution=17", 2),
        ),
        ({"attn_type": "flash"}, ("attn_type='flash'", "linear, none, vanilla")),
        ({"norm_type": "batch"}, ("norm_type='batch'", "group")),
        ({"block_type": "x"}, ("block_type='x'", "resnet")),
        (
            {"use_linear_attn": True, "attn_type": "none"},
            ("use_linear_attn=True", "attn_type='none'"),
        ),
    ],
)
def test_an_invalid_value_is_named(
    tiny_ddconfig: Config, keys: Config, parts: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        DDConfig.from_dict(tiny_ddconfig | keys)
    with pytest.raises(ValueError, match=mentions(*parts)):
        Encoder(**tiny_ddconfig | keys)


def test_several_errors_are_named_at_once(tiny_ddconfig: Config) -> None:
    del tiny_ddconfig["out_ch"]
    wrong = {"dropout": "0.1", "attention": 1}
    with pytest.raises(ValueError) as caught:
        DDConfig.from_dict(tiny_ddconfig | wrong)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "attention=1",
        "out_ch",
        "dropout='0.1'",
    ]
    with pytest.raises(ValueError) as caught:
        DDConfig(**tiny_ddconfig | {"out_ch": 0, "ch": 0, "attn_type": "flash"})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "ch=0",
        "out_ch=0",
        "attn_type='flash'",
    ]


def test_every_level_that_does_not_fit_is_named(tiny_ddconfig: Config) -> None:
    wrong = {"ch": 48, "ch_mult": [1, 3], "resolution": 15, "attn_resolutions": [15, 3]}
    with pytest.raises(ValueError) as caught:
        DDConfig.from_dict(tiny_ddconfig | wrong)
    parts = [("resolution=15",), ("ch=48", "48"), ("ch=48", "144"), ("attn_resolutions",)]
    lines = str(caught.value).splitlines()
    assert all(is_about(line, *known) for line, known in zip(lines, parts, strict=True))
