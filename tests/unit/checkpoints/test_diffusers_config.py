"""Convert between the config.json of diffusers and `model.params`."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.diffusers import FLUX2, PLAIN, config_of_params, params_of_config
from kl_vae.ddconfig import DDConfig
from kl_vae.latents import LatentNormalization
from tests.conftest import TINY_DDCONFIG
from tests.messages import mentions

Config = dict[str, Any]

PER_CHANNEL = {"mean": (0.5, -1.0, 0.0, 2.0), "std": (1.0, 2.0, 0.5, 4.0), "per_channel": True}
CONFIG: Config = {  # of the tiny model
    "_class_name": PLAIN,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 16,
}
NOTHING = object()


def whole(keys: Config, embed_dim: int | None = 4, latents: Config | None = None) -> Config:
    """Whole `model.params`, each key of the ddconfig given."""
    ddconfig = dataclasses.asdict(DDConfig.from_dict(TINY_DDCONFIG | keys))
    if latents is not None:
        latents = dataclasses.asdict(LatentNormalization(**latents))
    return {"ddconfig": ddconfig, "embed_dim": embed_dim, "latents": latents}


def completed(params: Config) -> Config:
    ddconfig = dataclasses.asdict(DDConfig.from_dict(params["ddconfig"]))
    latents = params["latents"] and dataclasses.asdict(LatentNormalization(**params["latents"]))
    return {"ddconfig": ddconfig, "embed_dim": params["embed_dim"], "latents": latents}


def through_json(config: Config) -> Config:
    return dict(json.loads(json.dumps(config, allow_nan=False)))


@pytest.mark.parametrize(
    ("keys", "embed_dim", "latents"),
    [
        ({}, 4, {"scale_factor": 0.18215}),
        ({}, None, {"scale_factor": 1.5305, "shift_factor": 0.0609}),
        ({}, 4, {"scale_factor": 1e-3, "shift_factor": -3.0}),
        ({}, 4, PER_CHANNEL),
        ({"z_channels": 16}, 16, {"scale_factor": 1.0}),
        ({"attn_resolutions": []}, 4, {"scale_factor": 1.0}),
        ({"attn_resolutions": [16, 8]}, 4, {"scale_factor": 1.0}),
        (
            {"ch_mult": [1, 2, 4, 4], "attn_resolutions": [16, 2], "num_res_blocks": 2},
            None,
            {"scale_factor": 1.0},
        ),
        ({"ch_mult": [1], "attn_resolutions": []}, 4, {"scale_factor": 1.0}),
        ({"ch_mult": [1], "attn_resolutions": [16]}, 4, {"scale_factor": 1.0}),
        ({"attn_type": "none", "attn_resolutions": []}, 4, {"scale_factor": 1.0}),
        ({"in_channels": 1, "out_ch": 1}, 4, {"scale_factor": 1.0}),
        ({"ch": 6, "norm_groups": 3}, 4, {"scale_factor": 1.0}),
        ({"resolution": 24, "attn_resolutions": [12]}, 4, {"scale_factor": 1.0}),
        ({"ch_mult": [1] * 11, "resolution": 1024, "attn_resolutions": [1]}, 4, {}),
    ],
)
def test_params_survive_a_round_trip(keys: Config, embed_dim: int | None, latents: Config) -> None:
    params = whole(keys, embed_dim, latents)
    config = through_json(config_of_params(params))
    assert completed(params_of_config(config, "it")) == params


def test_keys_without_an_effect_may_change() -> None:
    for params, expected in (
        # without attention anywhere, no level is numbered
        (whole({"attn_type": "none"}), whole({"attn_type": "none", "attn_resolutions": []})),
        # of one level nothing is resampled
        (
            whole({"ch_mult": [1], "attn_resolutions": [], "resamp_with_conv": False}),
            whole({"ch_mult": [1], "attn_resolutions": []}),
        ),
        (whole({"dropout": 0.5, "zero_init_residual": True}), whole({})),
    ):
        again = completed(params_of_config(config_of_params(params), "it"))
        assert again["ddconfig"] == expected["ddconfig"]


def test_unknown_scale_is_written_as_one() -> None:
    config = config_of_params(whole({}))
    assert config["scaling_factor"] == 1.0
    assert config["shift_factor"] is config["latents_mean"] is config["latents_std"] is None
    assert params_of_config(config, "it")["latents"] == {"scale_factor": 1.0, "shift_factor": 0.0}


def test_unused_means_and_stds_are_not_written() -> None:
    config = config_of_params(
        whole({}, 4, PER_CHANNEL | {"per_channel": False, "scale_factor": 2.0})
    )
    assert config["scaling_factor"] == 2.0
    assert config["latents_mean"] is config["latents_std"] is None


def test_patch_statistics_give_the_flux2_class() -> None:
    latents = {"mean": (0.0,) * 16, "std": (1.0,) * 16, "patch_size": 2, "per_channel": True}
    config = config_of_params(whole({}, 4, latents))
    assert config["_class_name"] == FLUX2
    assert config["patch_size"] == [2, 2]
    assert config["batch_norm_eps"] == 1e-4
    assert not config.keys() & {"scaling_factor", "shift_factor", "latents_mean", "force_upcast"}
    assert params_of_config(through_json(config), "it")["latents"] is None  # among the tensors


@pytest.mark.parametrize(
    "latents",
    [
        {"patch_size": 2, "scale_factor": 3.0},
        {"mean": (0.0,) * 16, "std": (1.0,) * 16, "patch_size": 2, "scale_factor": 3.0},
    ],
)
def test_patches_without_per_channel_give_the_plain_class(latents: Config) -> None:
    """Without `per_channel` it is `scale_factor` that normalises, with patches or not."""
    config = config_of_params(whole({}, 4, latents))
    assert config["_class_name"] == PLAIN
    assert config["scaling_factor"] == 3.0


@pytest.mark.parametrize(
    ("keys", "embed_dim", "parts"),
    [
        ({"attn_type": "linear"}, 4, ("attn_type=linear", "softmax")),
        ({"use_linear_attn": True}, 4, ("attn_type=linear", "softmax")),
        ({}, 3, ("embed_dim=3", "z_channels=4")),
        ({"ch_mult": [2, 4]}, 4, ("ch_mult=[2, 4]", "ch")),
        ({"resamp_with_conv": False}, 4, ("resamp_with_conv=false",)),
        ({"tanh_out": True}, 4, ("tanh_out=true",)),
        ({"context_channels": 5}, 4, ("context_channels=5",)),
    ],
)
def test_keys_unsupported_by_diffusers_are_an_error(
    keys: Config, embed_dim: int | None, parts: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=mentions("diffusers", *parts)) as caught:
        config_of_params(whole(keys, embed_dim))
    keys_named = re.findall(
        r"(attn_type|embed_dim|ch_mult|resamp_with_conv|tanh_out|context_channels)=",
        str(caught.value),
    )
    assert keys_named == [str(parts[0]).partition("=")[0]]


def test_all_unsupported_keys_are_named_at_once() -> None:
    params = whole(
        {"attn_type": "linear", "tanh_out": True, "ch_mult": [2], "attn_resolutions": []}, 3
    )
    params["ddconfig"] |= {"norm_type": "mine", "block_type": "own"}  # registered by a user
    parts = ("attn_type=linear", "softmax", "embed_dim=3", "z_channels=4", "ch_mult=[2]", "ch")
    parts += ("tanh_out=true", "norm_type=mine", "group", "block_type=own", "resnet")
    with pytest.raises(ValueError, match=mentions("diffusers", *parts)):
        config_of_params(params)


def test_a_registered_attention_is_unsupported() -> None:
    params = whole({})
    params["ddconfig"]["attn_type"] = "mine"
    with pytest.raises(ValueError, match=mentions("attn_type=mine", "softmax")):
        config_of_params(params)


def test_defaults_are_those_of_diffusers() -> None:
    """The oldest files leave out what had its default."""
    params = completed(params_of_config({}, "it"))
    expected = {
        "ch": 64,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "attn_resolutions": (),
        "attn_type": "vanilla",
        "in_channels": 3,
        "out_ch": 3,
        "z_channels": 4,
        "norm_groups": 32,
    }
    assert {key: params["ddconfig"][key] for key in expected} == expected
    assert params["embed_dim"] == 4
    assert params["latents"]["scale_factor"] == 0.18215
    assert params["latents"]["shift_factor"] == 0.0


@pytest.mark.filterwarnings("ignore")  # of packages that diffusers looks for
def test_diffusers_own_defaults_are_the_same() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = dict(diffusers.AutoencoderKL().config)
    listed = {key: list(x) if isinstance(x, tuple) else x for key, x in config.items()}
    theirs, ours = params_of_config(listed, "it"), params_of_config({}, "it")
    for params in (theirs, ours):
        params["ddconfig"].pop("resolution")  # 32 there, and it means nothing without attention
    assert theirs == ours


@pytest.mark.parametrize("name", [PLAIN, FLUX2])
def test_null_is_the_default(name: str) -> None:
    keys = ("layers_per_block", "latent_channels", "norm_num_groups", "in_channels", "out_channels")
    keys += ("use_quant_conv", "mid_block_add_attention", "scaling_factor", "shift_factor")
    given = {"_class_name": name} | dict.fromkeys(keys)
    assert params_of_config(given, "it") == params_of_config({"_class_name": name}, "it")


@pytest.mark.parametrize("act_fn", ["silu", "swish"])
def test_both_names_of_silu_are_read(act_fn: str) -> None:
    assert params_of_config({"act_fn": act_fn}, "it") == params_of_config({}, "it")


@pytest.mark.parametrize(
    ("size", "resolution"),
    [
        (16, 16),
        ([48, 64], 48),
        (1 << 70, 1 << 70),
        (None, 256),
        (0, 256),
        (-16, 256),
        (15, 256),
        (16.0, 256),
        (True, 256),
        ([], 256),
        ([[16]], 256),
        ("16", 256),
        ({}, 256),
        (math.nan, 256),
        (NOTHING, 256),
    ],
)
def test_any_sample_size_gives_a_resolution(size: object, resolution: int) -> None:
    """The resolution only names the attention levels, so that any value is accepted."""
    config = {key: x for key, x in (CONFIG | {"sample_size": size}).items() if x is not NOTHING}
    ddconfig = completed(params_of_config(config, "it"))["ddconfig"]
    assert ddconfig["resolution"] == resolution
    assert ddconfig["attn_resolutions"] == (resolution // 2,)


def test_a_resolution_is_found_for_any_number_of_levels() -> None:
    config = {"block_out_channels": [32] * 12, "sample_size": 256}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * 12}
    config |= {"up_block_types": ["UpDecoderBlock2D"] * 12}
    assert completed(params_of_config(config, "it"))["ddconfig"]["resolution"] == 2048


def test_means_and_stds_are_those_of_diffusers_pipelines() -> None:
    """(z - latents_mean) * scaling_factor / latents_std; ours divides by std alone."""
    config = CONFIG | {"scaling_factor": 0.5, "shift_factor": 9.0}
    config |= {"latents_mean": [1, -2.0, 0, 3.5], "latents_std": [1, 2.0, 4, 0.25]}
    latents = params_of_config(config, "it")["latents"]
    z = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    mean, std = (torch.tensor(config[f"latents_{x}"]).view(4, 1, 1) for x in ("mean", "std"))
    normalised = LatentNormalization(**latents).normalize(z)
    assert torch.allclose(normalised, (z - mean) * 0.5 / std, rtol=1e-15)


def test_unused_scale_is_not_written() -> None:
    """Its pipelines would multiply by it as well."""
    config = config_of_params(
        whole({}, 4, PER_CHANNEL | {"scale_factor": 0.5, "shift_factor": 3.0})
    )
    assert (config["scaling_factor"], config["shift_factor"]) == (1.0, None)
    assert params_of_config(config, "it")["latents"] == PER_CHANNEL


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
def test_mean_or_std_alone_is_not_used(key: str) -> None:
    latents = params_of_config(CONFIG | {key: [1.0] * 4, "scaling_factor": 2}, "it")["latents"]
    assert latents == {"scale_factor": 2.0, "shift_factor": 0.0}


CLASS_NAMES = ("AutoencoderKL", "AutoencoderKLFlux2")
BAD: list[tuple[Config, tuple[object, ...]]] = [
    ({"_class_name": "AutoencoderKLWan"}, ("'AutoencoderKLWan'", *CLASS_NAMES)),
    ({"_class_name": ["AutoencoderKL"]}, ("['AutoencoderKL']", *CLASS_NAMES)),
    ({"_class_name": None}, ("None", *CLASS_NAMES)),
    ({"block_out_channels": "128"}, ("block_out_channels='128'",)),
    ({"block_out_channels": {"0": 32}}, ("block_out_channels={'0': 32}",)),
    ({"block_out_channels": 1e9}, ("block_out_channels=1000000000.0",)),
    ({"block_out_channels": [True, 64]}, ("block_out_channels=[True, 64]",)),
    ({"block_out_channels": [32.0, 64]}, ("block_out_channels=[32.0, 64]",)),
    ({"block_out_channels": [[32], 64]}, ("block_out_channels=[[32], 64]",)),
    ({"block_out_channels": [0, 64]}, ("block_out_channels=[0, 64]",)),
    ({"block_out_channels": [32, -64]}, ("block_out_channels=[32, -64]",)),
    ({"block_out_channels": [None, None]}, ("block_out_channels=[None, None]",)),
    ({"block_out_channels": [64, 96]}, ("block_out_channels=[64, 96]", "multiples")),
    (
        {"block_out_channels": [], "down_block_types": [], "up_block_types": []},
        ("block_out_channels=[]",),
    ),
    (
        {"block_out_channels": [32]},
        (
            "down_block_types=['DownEncoderBlock2D', 'AttnDownEncoderBlock2D']",
            "DownEncoderBlock2D, AttnDownEncoderBlock2D",
        ),
    ),
    ({"down_block_types": "DownEncoderBlock2D"}, ("down_block_types='DownEncoderBlock2D'",)),
    (
        {"down_block_types": ["CrossAttnDownBlock2D"] * 2},
        ("down_block_types=['CrossAttnDownBlock2D',", "DownEncoderBlock2D, AttnDownEncoderBlock2D"),
    ),
    (
        {"down_block_types": [["DownEncoderBlock2D"]] * 2},
        ("down_block_types=[['DownEncoderBlock2D'],", "DownEncoderBlock2D, AttnDownEncoderBlock2D"),
    ),
    (
        {"down_block_types": [None, {}]},
        ("down_block_types=[None, {}]", "DownEncoderBlock2D, AttnDownEncoderBlock2D"),
    ),
    (
        {"up_block_types": ["UpDecoderBlock2D"]},
        ("up_block_types=['UpDecoderBlock2D']", "UpDecoderBlock2D, AttnUpDecoderBlock2D"),
    ),
    (
        {"up_block_types": ["UpDecoderBlock2D"] * 2},
        ("up_block_types=['UpDecoderBlock2D', 'UpDecoderBlock2D']", "down_block_types"),
    ),
    ({"mid_block_add_attention": False}, ("mid_block_add_attention=False", "attention")),
    ({"mid_block_add_attention": 1}, ("mid_block_add_attention=1", "true", "false")),
    (
        {"decoder_block_out_channels": [32, 32]},
        ("decoder_block_out_channels=[32, 32]", "block_out_channels", "[32, 64]"),
    ),
    ({"decoder_block_out_channels": 32}, ("decoder_block_out_channels=32",)),
    ({"act_fn": "gelu"}, ("act_fn='gelu'", "silu")),
    ({"act_fn": ["silu"]}, ("act_fn=['silu']", "silu")),
    ({"use_quant_conv": False}, ("use_quant_conv=False", "use_post_quant_conv=True")),
    ({"use_post_quant_conv": False}, ("use_quant_conv=True", "use_post_quant_conv=False")),
    ({"use_quant_conv": "no"}, ("use_quant_conv='no'", "true", "false")),
    ({"latent_channels": "4"}, ("latent_channels='4'",)),
    ({"latent_channels": 4.0}, ("latent_channels=4.0",)),
    ({"layers_per_block": [1, 1]}, ("layers_per_block=[1, 1]",)),
    ({"layers_per_block": True}, ("layers_per_block=True",)),
    ({"in_channels": {}}, ("in_channels={}",)),
    ({"out_channels": "x" * 200}, (f"out_channels='{'x' * 79}",)),
    ({"norm_num_groups": math.inf}, ("norm_num_groups=inf",)),
    ({"scaling_factor": 0}, ("scaling_factor=0.0",)),
    ({"scaling_factor": -0.0}, ("scaling_factor=-0.0", 0)),
    ({"scaling_factor": -0.18215}, ("scaling_factor=-0.18215", 0)),
    ({"scaling_factor": "0.18215"}, ("scaling_factor='0.18215'", "finite")),
    ({"scaling_factor": True}, ("scaling_factor=True", "finite")),
    ({"scaling_factor": math.nan}, ("scaling_factor=nan", "finite")),
    ({"scaling_factor": math.inf}, ("scaling_factor=inf", "finite")),
    ({"scaling_factor": 10**400}, (f"scaling_factor=1{'0' * 79}", "finite")),
    ({"shift_factor": -(10**400)}, (f"shift_factor=-1{'0' * 78}", "finite")),
    ({"shift_factor": math.nan}, ("shift_factor=nan", "finite")),
    ({"shift_factor": []}, ("shift_factor=[]", "finite")),
    ({"latents_mean": 0.0}, ("latents_mean=0.0",)),
    ({"latents_mean": [0.0] * 3}, ("latents_mean=[0.0, 0.0, 0.0]", 4, "latent_channels")),
    ({"latents_mean": []}, ("latents_mean=[]", 4, "latent_channels")),
    ({"latents_mean": ["0"] * 4}, ("latents_mean=['0', '0', '0', '0']", 4)),
    ({"latents_mean": [0, 0, 0, None]}, ("latents_mean=[0, 0, 0, None]", 4)),
    ({"latents_mean": [math.nan] * 4}, ("latents_mean=[nan, nan, nan, nan]", 4)),
    ({"latents_mean": [[0.0]] * 4}, ("latents_mean=[[0.0], [0.0], [0.0], [0.0]]", 4)),
    ({"latents_std": [1.0] * 5}, ("latents_std=[1.0, 1.0, 1.0, 1.0, 1.0]", 4)),
    ({"latents_std": [1, 1, 1, True]}, ("latents_std=[1, 1, 1, True]", 4)),
    ({"latents_std": [1, 1, 1, "1"]}, ("latents_std=[1, 1, 1, '1']", 4)),
    ({"latents_std": [1, 1, 1, 10**400]}, (f"latents_std=[1, 1, 1, 1{'0' * 69}", 4)),
    ({"latents_std": [1, 1, 1, 0]}, ("latents_std=[1, 1, 1, 0]",)),
    ({"latents_std": [1, 1, 1, -1.0]}, ("latents_std=[1, 1, 1, -1.0]", 0)),
    ({"batch_norm_eps": "x"}, ("batch_norm_eps='x'", "finite")),
    ({"batch_norm_eps": None}, ("batch_norm_eps=None", 0)),
    ({"batch_norm_eps": -1e-5}, ("batch_norm_eps=-1e-05", 0)),
]


def with_both(keys: Config) -> Config:
    """Add the valid std to an invalid mean, and the reverse."""
    latents = {"latents_mean": [0] * 4, "latents_std": [1] * 4}
    return latents | keys if latents.keys() & keys.keys() else keys


@pytest.mark.parametrize(("keys", "parts"), BAD)
def test_invalid_values_are_an_error(keys: Config, parts: tuple[object, ...]) -> None:
    config = CONFIG | with_both(keys)
    with pytest.raises(ValueError, match=mentions("it:", *parts)) as caught:
        params_of_config(config, "it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attention", [False, True])
def test_too_many_levels_are_an_error(attention: bool) -> None:
    """Each level would double the resolution of the config."""
    n = 200_000
    config = {
        "block_out_channels": [32] * n,
        "down_block_types": ["Attn" * attention + "DownEncoderBlock2D"] * n,
        "up_block_types": ["Attn" * attention + "UpDecoderBlock2D"] * n,
    }
    with pytest.raises(ValueError, match=mentions("it:", "block_out_channels=[32,", "32 levels")):
        params_of_config(config, "it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "vae"
    torch.manual_seed(0)
    AutoEncoderKL(TINY_DDCONFIG, 4, latents={"scale_factor": 0.5}).save_pretrained(path)
    return path


@pytest.fixture
def written(folder: Path, tmp_path: Path) -> Path:
    """The folder of a whole model; its config.json may be changed."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(folder: Path, keys: Config) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_loaded_model_has_its_scale(written: Path) -> None:
    model = AutoEncoderKL.from_checkpoint(written)
    assert model.config == DDConfig.from_dict(TINY_DDCONFIG)
    assert model.latents == LatentNormalization(scale_factor=0.5)


@pytest.mark.parametrize(("keys", "parts"), [case for case in BAD if "_class_name" not in case[0]])
def test_loading_names_the_value_and_the_file(
    written: Path, keys: Config, parts: tuple[object, ...]
) -> None:
    edit(written, with_both(keys))
    with pytest.raises(ValueError, match=mentions(written / "config.json", *parts)):
        AutoEncoderKL.from_checkpoint(written)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (
            {"block_out_channels": [10**12, 10**12]},
            ("ch=32", 10**12, "ch_mult=[1, 2]", "[1, 1]", "config"),
        ),
        ({"block_out_channels": [32, 32 * 10**30]}, ("ch_mult=[1, 2]", f"[1, {10**30}]")),
        ({"layers_per_block": 10**9}, ("num_res_blocks=1", 10**9, "config")),
        (
            {"in_channels": 10**9, "out_channels": 10**9},
            ("in_channels=3", "out_ch=3", 10**9, "config"),
        ),
        ({"latent_channels": 10**9}, ("z_channels=4", "embed_dim=4", 10**9)),
        (
            {"use_quant_conv": False, "use_post_quant_conv": False},
            ("embed_dim=4", "null", "config"),
        ),
        (
            {
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
                "mid_block_add_attention": False,
            },
            ("attention_levels=[1]", "[]", "attn_type=vanilla", "none"),
        ),
        ({"norm_num_groups": 7}, ("ddconfig.ch=32", 7)),
        ({"norm_num_groups": 0}, ("ddconfig.norm_groups=0", 1)),
        ({"layers_per_block": 0}, ("ddconfig.num_res_blocks=0", 1)),
        ({"latent_channels": -1}, ("ddconfig.z_channels=-1", 1)),
        ({"out_channels": 4}, ("out_ch=4", 3)),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_an_error(
    written: Path, keys: Config, parts: tuple[object, ...]
) -> None:
    """The check comes before the model is built, which could take any amount of memory."""
    edit(written, keys)
    with pytest.raises(ValueError, match=mentions(f"{written}", *parts)):
        AutoEncoderKL.from_checkpoint(written)


def test_deeply_nested_values_are_an_error(written: Path) -> None:
    """The recursion limits of parsing JSON and of printing a list differ."""
    path = written / "config.json"
    whole_text = path.read_text().rstrip().rstrip("}")
    for depth in (*range(1, 3000, 9), 100_000):
        nested = "[" * depth + "]" * depth
        for key in ("block_out_channels", "down_block_types", "act_fn"):
            path.write_text(f'{whole_text}, "{key}": {nested}}}')
            with pytest.raises(ValueError, match=mentions("config.json")):
                AutoEncoderKL.from_checkpoint(written)
