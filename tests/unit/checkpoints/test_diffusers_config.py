"""diffusers' config.json and `model.params`: what both express goes both ways, else it is named."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.diffusers import FLUX2, PLAIN, config_of_params, params_of_config
from kl_vae.ddconfig import DDConfig
from kl_vae.latents import LatentNormalization
from tests.conftest import TINY_DDCONFIG

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
def test_what_can_be_expressed_goes_there_and_back(
    keys: Config, embed_dim: int | None, latents: Config
) -> None:
    params = whole(keys, embed_dim, latents)
    config = through_json(config_of_params(params))
    assert completed(params_of_config(config, "it")) == params


def test_what_the_function_of_the_model_does_not_depend_on_may_change() -> None:
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


def test_latents_of_unknown_scale_are_left_as_they_are() -> None:
    config = config_of_params(whole({}))
    assert config["scaling_factor"] == 1.0
    assert config["shift_factor"] is config["latents_mean"] is config["latents_std"] is None
    assert params_of_config(config, "it")["latents"] == {"scale_factor": 1.0, "shift_factor": 0.0}


def test_means_and_stds_that_are_not_used_are_not_written() -> None:
    config = config_of_params(
        whole({}, 4, PER_CHANNEL | {"per_channel": False, "scale_factor": 2.0})
    )
    assert config["scaling_factor"] == 2.0
    assert config["latents_mean"] is config["latents_std"] is None


def test_a_batch_norm_is_of_flux2() -> None:
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
def test_patches_that_are_not_normalised_are_no_batch_norm(latents: Config) -> None:
    """Without `per_channel` it is `scale_factor` that normalises, with patches or not."""
    config = config_of_params(whole({}, 4, latents))
    assert config["_class_name"] == PLAIN
    assert config["scaling_factor"] == 3.0


@pytest.mark.parametrize(
    ("keys", "embed_dim", "error"),
    [
        ({"attn_type": "linear"}, 4, "attn_type=linear: it has softmax attention only"),
        ({"use_linear_attn": True}, 4, "attn_type=linear: it has softmax attention only"),
        ({}, 3, "embed_dim=3: it has latents of z_channels=4 only"),
        ({"ch_mult": [2, 4]}, 4, "ch_mult=[2, 4]: its first level has ch channels"),
        ({"resamp_with_conv": False}, 4, "resamp_with_conv=false: it resamples with convolutions"),
        ({"tanh_out": True}, 4, "tanh_out=true: its decoder ends in a convolution"),
        ({"context_channels": 5}, 4, "context_channels=5: it takes no context"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(
    keys: Config, embed_dim: int | None, error: str
) -> None:
    with pytest.raises(ValueError) as caught:
        config_of_params(whole(keys, embed_dim))
    assert str(caught.value) == f"diffusers cannot express this model: {error}"


def test_all_that_diffusers_cannot_express_is_named_at_once() -> None:
    params = whole(
        {"attn_type": "linear", "tanh_out": True, "ch_mult": [2], "attn_resolutions": []}, 3
    )
    params["ddconfig"] |= {"norm_type": "mine", "block_type": "own"}  # registered by a user
    with pytest.raises(ValueError) as caught:
        config_of_params(params)
    assert str(caught.value) == (
        "diffusers cannot express this model: attn_type=linear: it has softmax attention only; "
        "embed_dim=3: it has latents of z_channels=4 only; ch_mult=[2]: its first level has ch "
        "channels; tanh_out=true: its decoder ends in a convolution; norm_type=mine: it has group "
        "only; block_type=own: it has resnet only"
    )


def test_an_attention_of_the_users_own_is_named() -> None:
    params = whole({})
    params["ddconfig"]["attn_type"] = "mine"
    with pytest.raises(ValueError, match="attn_type=mine: it has softmax attention only$"):
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
    """It only says what attention's levels are called, so that no value of it is a mistake."""
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


def test_a_scale_that_is_not_used_is_not_written() -> None:
    """Its pipelines would multiply by it as well."""
    config = config_of_params(
        whole({}, 4, PER_CHANNEL | {"scale_factor": 0.5, "shift_factor": 3.0})
    )
    assert (config["scaling_factor"], config["shift_factor"]) == (1.0, None)
    assert params_of_config(config, "it")["latents"] == PER_CHANNEL


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
def test_one_of_mean_and_std_alone_is_not_used(key: str) -> None:
    latents = params_of_config(CONFIG | {key: [1.0] * 4, "scaling_factor": 2}, "it")["latents"]
    assert latents == {"scale_factor": 2.0, "shift_factor": 0.0}


BAD: list[tuple[Config, str]] = [
    ({"_class_name": "AutoencoderKLWan"}, "of 'AutoencoderKLWan'; kl_vae reads AutoencoderKL and "),
    ({"_class_name": ["AutoencoderKL"]}, "of ['AutoencoderKL']; kl_vae reads"),
    ({"_class_name": None}, "of None; kl_vae reads AutoencoderKL and AutoencoderKLFlux2"),
    ({"block_out_channels": "128"}, "block_out_channels='128': must be a list"),
    ({"block_out_channels": {"0": 32}}, "block_out_channels={'0': 32}: must be a list"),
    ({"block_out_channels": 1e9}, "block_out_channels=1000000000.0: must be a list"),
    ({"block_out_channels": [True, 64]}, "block_out_channels=[True, 64]: must be whole numbers a"),
    ({"block_out_channels": [32.0, 64]}, "block_out_channels=[32.0, 64]: must be whole numbers"),
    ({"block_out_channels": [[32], 64]}, "block_out_channels=[[32], 64]: must be whole numbers"),
    ({"block_out_channels": [0, 64]}, "block_out_channels=[0, 64]: must be whole numbers above 0"),
    ({"block_out_channels": [32, -64]}, "block_out_channels=[32, -64]: must be whole numbers"),
    ({"block_out_channels": [None, None]}, "block_out_channels=[None, None]: must be whole"),
    ({"block_out_channels": [64, 96]}, "block_out_channels=[64, 96]: must be multiples of the fi"),
    (
        {"block_out_channels": [], "down_block_types": [], "up_block_types": []},
        "block_out_channels=[]: must be whole numbers above 0",
    ),
    (
        {"block_out_channels": [32]},
        "down_block_types=['DownEncoderBlock2D', 'AttnDownEncoderBlock2D']: give one of "
        "DownEncoderBlock2D, AttnDownEncoderBlock2D for each level",
    ),
    ({"down_block_types": "DownEncoderBlock2D"}, "down_block_types='DownEncoderBlock2D': must be"),
    ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "down_block_types=['CrossAttnDownBlock2"),
    ({"down_block_types": [["DownEncoderBlock2D"]] * 2}, "down_block_types=[['DownEncoderBlock2D"),
    ({"down_block_types": [None, {}]}, "down_block_types=[None, {}]: give one of DownEncoderBlo"),
    (
        {"up_block_types": ["UpDecoderBlock2D"]},
        "up_block_types=['UpDecoderBlock2D']: give one of UpDecoderBlock2D, AttnUpDecoderBlock2D "
        "for each level",
    ),
    (
        {"up_block_types": ["UpDecoderBlock2D"] * 2},
        "up_block_types=['UpDecoderBlock2D', 'UpDecoderBlock2D']: attention in other levels than "
        "down_block_types has",
    ),
    (
        {"mid_block_add_attention": False},
        "mid_block_add_attention=False: attention in levels, none in the middle",
    ),
    ({"mid_block_add_attention": 1}, "mid_block_add_attention=1: must be true or false"),
    (
        {"decoder_block_out_channels": [32, 32]},
        "decoder_block_out_channels=[32, 32]: must be as block_out_channels, [",
    ),
    ({"decoder_block_out_channels": 32}, "decoder_block_out_channels=32: must be a list"),
    ({"act_fn": "gelu"}, "act_fn='gelu': must be silu"),
    ({"act_fn": ["silu"]}, "act_fn=['silu']: must be silu"),
    ({"use_quant_conv": False}, "use_quant_conv=False: use_post_quant_conv=True differs"),
    ({"use_post_quant_conv": False}, "use_quant_conv=True: use_post_quant_conv=False differs"),
    ({"use_quant_conv": "no"}, "use_quant_conv='no': must be true or false"),
    ({"latent_channels": "4"}, "latent_channels='4': must be a whole number"),
    ({"latent_channels": 4.0}, "latent_channels=4.0: must be a whole number"),
    ({"layers_per_block": [1, 1]}, "layers_per_block=[1, 1]: must be a whole number"),
    ({"layers_per_block": True}, "layers_per_block=True: must be a whole number"),
    ({"in_channels": {}}, "in_channels={}: must be a whole number"),
    ({"out_channels": "x" * 200}, f"out_channels='{'x' * 79}: must be a whole number"),
    ({"norm_num_groups": math.inf}, "norm_num_groups=inf: must be a whole number"),
    ({"scaling_factor": 0}, "scaling_factor=0.0: must be above 0"),
    ({"scaling_factor": -0.0}, "scaling_factor=-0.0: must be above 0"),
    ({"scaling_factor": -0.18215}, "scaling_factor=-0.18215: must be above 0"),
    ({"scaling_factor": "0.18215"}, "scaling_factor='0.18215': must be a finite number"),
    ({"scaling_factor": True}, "scaling_factor=True: must be a finite number"),
    ({"scaling_factor": math.nan}, "scaling_factor=nan: must be a finite number"),
    ({"scaling_factor": math.inf}, "scaling_factor=inf: must be a finite number"),
    ({"scaling_factor": 10**400}, f"scaling_factor=1{'0' * 79}: must be a finite number"),
    ({"shift_factor": -(10**400)}, f"shift_factor=-1{'0' * 78}: must be a finite number"),
    ({"shift_factor": math.nan}, "shift_factor=nan: must be a finite number"),
    ({"shift_factor": []}, "shift_factor=[]: must be a finite number"),
    ({"latents_mean": 0.0}, "latents_mean=0.0: must be a list"),
    ({"latents_mean": [0.0] * 3}, "latents_mean=[0.0, 0.0, 0.0]: must be 4 numbers, as latent_ch"),
    ({"latents_mean": []}, "latents_mean=[]: must be 4 numbers, as latent_channels"),
    ({"latents_mean": ["0"] * 4}, "latents_mean=['0', '0', '0', '0']: must be 4 numbers"),
    ({"latents_mean": [0, 0, 0, None]}, "latents_mean=[0, 0, 0, None]: must be 4 numbers"),
    ({"latents_mean": [math.nan] * 4}, "latents_mean=[nan, nan, nan, nan]: must be 4 numbers"),
    ({"latents_mean": [[0.0]] * 4}, "latents_mean=[[0.0], [0.0], [0.0], [0.0]]: must be 4 numbe"),
    ({"latents_std": [1.0] * 5}, "latents_std=[1.0, 1.0, 1.0, 1.0, 1.0]: must be 4 numbers"),
    ({"latents_std": [1, 1, 1, True]}, "latents_std=[1, 1, 1, True]: must be 4 numbers"),
    ({"latents_std": [1, 1, 1, "1"]}, "latents_std=[1, 1, 1, '1']: must be 4 numbers"),
    ({"latents_std": [1, 1, 1, 10**400]}, "latents_std=[1, 1, 1, 1000"),
    ({"latents_std": [1, 1, 1, 0]}, "latents_std=[1, 1, 1, 0]: must be above 0"),
    ({"latents_std": [1, 1, 1, -1.0]}, "latents_std=[1, 1, 1, -1.0]: must be above 0"),
    ({"batch_norm_eps": "x"}, "batch_norm_eps='x': must be a finite number"),
    ({"batch_norm_eps": None}, "batch_norm_eps=None: must be at least 0"),
    ({"batch_norm_eps": -1e-5}, "batch_norm_eps=-1e-05: must be at least 0"),
]


def with_both(keys: Config) -> Config:
    """Of a bad mean the std, and the other way round."""
    latents = {"latents_mean": [0] * 4, "latents_std": [1] * 4}
    return latents | keys if latents.keys() & keys.keys() else keys


@pytest.mark.parametrize(("keys", "error"), BAD)
def test_what_is_no_config_of_ours_is_refused(keys: Config, error: str) -> None:
    config = CONFIG | with_both(keys)
    with pytest.raises(ValueError) as caught:
        params_of_config(config, "it")
    assert str(caught.value).startswith(f"it: {error}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attention", [False, True])
def test_levels_without_end_are_refused(attention: bool) -> None:
    """A resolution that so many levels halve would have as many digits."""
    n = 200_000
    config = {
        "block_out_channels": [32] * n,
        "down_block_types": ["Attn" * attention + "DownEncoderBlock2D"] * n,
        "up_block_types": ["Attn" * attention + "UpDecoderBlock2D"] * n,
    }
    with pytest.raises(ValueError, match=r"^it: block_out_channels=\[32, .*: more than 32 levels$"):
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


def test_a_model_comes_back_with_its_scale(written: Path) -> None:
    model = AutoEncoderKL.from_checkpoint(written)
    assert model.config == DDConfig.from_dict(TINY_DDCONFIG)
    assert model.latents == LatentNormalization(scale_factor=0.5)


@pytest.mark.parametrize(("keys", "error"), [case for case in BAD if "_class_name" not in case[0]])
def test_loading_names_the_mistake_and_the_file(written: Path, keys: Config, error: str) -> None:
    edit(written, with_both(keys))
    with pytest.raises(ValueError) as caught:
        AutoEncoderKL.from_checkpoint(written)
    assert str(caught.value).startswith(f"{written / 'config.json'}: {error}")


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (
            {"block_out_channels": [10**12, 10**12]},
            "its tensors have ch=32 (not 1000000000000), ch_mult=[1, 2] (not [1, 1]); use the "
            "config it was trained with",
        ),
        ({"block_out_channels": [32, 32 * 10**30]}, "its tensors have ch_mult=[1, 2] (not [1, 10"),
        (
            {"layers_per_block": 10**9},
            "its tensors have num_res_blocks=1 (not 1000000000); use the",
        ),
        (
            {"in_channels": 10**9, "out_channels": 10**9},
            "its tensors have in_channels=3 (not 1000000000), out_ch=3 (not 1000000000); use the",
        ),
        (
            {"latent_channels": 10**9},
            "its tensors have z_channels=4 (not 1000000000), embed_dim=4 (",
        ),
        (
            {"use_quant_conv": False, "use_post_quant_conv": False},
            "its tensors have embed_dim=4 (not null); use",
        ),
        (
            {
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
                "mid_block_add_attention": False,
            },
            "its tensors have attention_levels=[1] (not []), attn_type=vanilla (not none)",
        ),
        ({"norm_num_groups": 7}, "ddconfig.ch=32: channels 32 cannot be split into 7 groups"),
        ({"norm_num_groups": 0}, "ddconfig.norm_groups=0: must be at least 1"),
        ({"layers_per_block": 0}, "ddconfig.num_res_blocks=0: must be at least 1"),
        ({"latent_channels": -1}, "ddconfig.z_channels=-1: must be at least 1"),
        ({"out_channels": 4}, "out_ch=4: a reconstruction has the image's channels; set 3, as in"),
    ],
)
def test_a_config_that_lies_is_held_against_the_tensors(
    written: Path, keys: Config, error: str
) -> None:
    """Before anything is built: it could ask for any amount of memory."""
    edit(written, keys)
    with pytest.raises(ValueError) as caught:
        AutoEncoderKL.from_checkpoint(written)
    assert str(caught.value).startswith(f"{written}: {error}")


def test_nested_values_of_any_depth_are_refused(written: Path) -> None:
    """Python reads JSON to another depth than it shows lists."""
    path = written / "config.json"
    whole_text = path.read_text().rstrip().rstrip("}")
    for depth in (*range(1, 3000, 9), 100_000):
        nested = "[" * depth + "]" * depth
        for key in ("block_out_channels", "down_block_types", "act_fn"):
            path.write_text(f'{whole_text}, "{key}": {nested}}}')
            with pytest.raises(ValueError, match=r"config\.json: "):
                AutoEncoderKL.from_checkpoint(written)
