"""Find the tensors of the autoencoder in checkpoints of trainers and pipelines."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.reading import autoencoder_tensors, select
from tests.messages import mentions

Tensors = dict[str, Tensor]
KEYS = ("encoder.conv_in.weight", "encoder.x.bias", "decoder.conv_in.weight", "quant_conv.weight")


def tensors(value: float = 1.0, prefix: str = "", keys: tuple[str, ...] = KEYS) -> Tensors:
    return {prefix + key: torch.full((2,), value) for key in keys}


def assert_found(content: object, value: float = 1.0, ema: bool = True) -> None:
    """Assert that exactly the four tensors are found, each filled with the value."""
    found = autoencoder_tensors(content, "it", ema)
    assert found.keys() == set(KEYS)
    assert {float(x.mean()) for x in found.values()} == {value}


def shadows(value: float) -> Tensors:
    """The averages of `tensors`, as latent-diffusion's LitEma registers them."""
    averages = {f"model_ema.{key.replace('.', '')}": x for key, x in tensors(value).items()}
    return averages | {
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.num_updates": torch.ones(()),
    }


@pytest.mark.parametrize(
    "content",
    [
        tensors(),
        OrderedDict(tensors()),
        {"state_dict": tensors(), "epoch": 3},
        {"model": tensors(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "model": tensors()},
        {"model": {"state_dict": tensors()}},
        {"trainer": {"model": {"state_dict": tensors()}}},
        {"a": {"b": {"c": {"d": tensors()}}}},
        {"state_dict": tensors(), "callbacks": {"Checkpoint": {"best": torch.zeros(())}}},
        {"model": tensors(), "discriminator": {"conv.weight": torch.zeros(2)}},
        {**tensors(), "epoch": 3, "name": "x", "none": None, "list": [torch.zeros(2)]},
        {**tensors(), 7: None, None: {}, (1, 2): {}, 3.5: "x"},
        {3: {4: tensors()}},
    ],
)
@pytest.mark.parametrize("ema", [True, False])
def test_the_state_dict_is_found_in_its_wrapping(content: object, ema: bool) -> None:
    assert_found(content, ema=ema)


@pytest.mark.parametrize(
    "content",
    [
        {"encoder.weight": torch.ones(3)},
        {"state_dict": {"encoder.weight": torch.ones(3)}, "epoch": 3},
        {
            "optimizer": {"state": {0: {"x": torch.ones(1)}}},
            "model": {"encoder.weight": torch.ones(3)},
        },
        {"model": {"state_dict": {"module.encoder.weight": torch.ones(3)}}},
        {"encoder.weight": torch.ones(3), "epoch": 3},
    ],
)
def test_tensors_of_other_models_are_returned(content: object) -> None:
    """A later check reports the missing tensors."""
    found = autoencoder_tensors(content, "it")
    assert found.keys() == {"encoder.weight"}
    assert torch.equal(found["encoder.weight"], torch.ones(3))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        (None, "NoneType"),
        ({}, "tensors"),
        ({"epoch": 3}, "tensors"),
        ({"state_dict": {}}, "tensors"),
        ({"state_dict": [tensors()]}, "tensors"),
        ({"a": {"b": {"c": {"d": {"e": tensors()}}}}}, "tensors"),
    ],
)
def test_a_file_without_a_state_dict_is_an_error(content: object, part: str) -> None:
    with pytest.raises(ValueError, match=mentions("it:", part, "state dict")):
        autoencoder_tensors(content, "it")


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "_fsdp_wrapped_module.",
        "module._fsdp_wrapped_module._checkpoint_wrapped_module.",
        "first_stage_model.",
        "module.first_stage_model.",
        "_orig_mod.first_stage_model._orig_mod.",
        "vae.",
        "autoencoder.",
        "model.vae.",
        "my.own.trainer.net.",
    ],
)
@pytest.mark.parametrize("ema", [True, False])
def test_prefixes_are_removed(prefix: str, ema: bool) -> None:
    assert_found(tensors(prefix=prefix), ema=ema)
    assert_found({"state_dict": tensors(prefix=prefix)}, ema=ema)


@pytest.mark.parametrize("prefix", ["", "module.", "first_stage_model.", "net."])
def test_loss_tensors_are_kept(prefix: str) -> None:
    own = (*KEYS, "loss.logvar", "loss.discriminator.main.0.weight", "encoder.module.x")
    assert autoencoder_tensors(tensors(1.0, prefix, own), "it").keys() == set(own)


def test_prefixes_of_submodules_are_removed() -> None:
    keys = (
        "encoder._orig_mod.conv_in.weight",
        "_fsdp_wrapped_module.encoder._fsdp_wrapped_module.x.bias",
        "decoder._checkpoint_wrapped_module._orig_mod.conv_in.weight",
        "quant_conv._orig_mod.weight",
    )
    assert_found(tensors(keys=keys))


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        AveragedModel,
        nn.DataParallel,
        lambda model: AveragedModel(nn.DataParallel(model)),
        lambda model: nn.ModuleDict({"vae": model, "unet": nn.Linear(1, 1)}),
    ],
)
def test_state_dicts_of_wrapped_models(
    tiny_model: AutoEncoderKL, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    own = tiny_model.state_dict()
    found = autoencoder_tensors({"model": wrap(tiny_model).state_dict()}, "it")
    assert found.keys() == own.keys()  # without n_averaged
    assert all(torch.equal(x, own[key]) for key, x in found.items())


def test_state_dict_of_a_partly_compiled_model(tiny_model: AutoEncoderKL) -> None:
    keys = tiny_model.state_dict().keys()
    tiny_model.encoder = torch.compile(tiny_model.encoder)  # type: ignore[assignment]
    tiny_model.decoder.mid = torch.compile(tiny_model.decoder.mid)  # type: ignore[assignment]
    assert "encoder._orig_mod.conv_in.weight" in tiny_model.state_dict()
    assert autoencoder_tensors(tiny_model.state_dict(), "it").keys() == keys


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", "module.first_stage_model."])
@pytest.mark.parametrize("ema", [True, False])
def test_only_the_autoencoder_of_a_pipeline_is_returned(prefix: str, ema: bool) -> None:
    others = {
        "model.diffusion_model.encoder.x": torch.zeros(1),
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1),
        "cond_stage_model.transformer.x": torch.zeros(1),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(1),  # of the U-Net
        "model_ema.decay": torch.zeros(()),
        "model_ema.num_updates": torch.zeros(()),
        "betas": torch.zeros(1000),
        "scale_factor": torch.zeros(()),
    }
    assert_found(others | tensors(prefix=prefix), ema=ema)
    assert_found({"state_dict": tensors(prefix=prefix) | others, "global_step": 1}, ema=ema)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ("first_stage_model.", "conditioner.embedders.3.encoder."),  # Stable Video Diffusion
        ("first_stage_model.", "cond_stage_model."),
        ("first_stage_model.", "a."),
        ("vae.", "audio_vae."),
        ("vae.", "semantic_vae."),
        ("", "teacher."),
        ("", "loss.perceptual."),
        ("module.", "module.teacher."),
        ("net.", "net.teacher."),
    ],
)
@pytest.mark.parametrize("ema", [True, False])
def test_the_first_stage_is_preferred_to_other_autoencoders(
    first: str, other: str, ema: bool
) -> None:
    assert_found(tensors(2.0, other) | tensors(1.0, first), ema=ema)
    assert_found(tensors(1.0, first) | tensors(2.0, other), ema=ema)


@pytest.mark.parametrize("prefix", ["", "module.", "first_stage_model.", "module.vae."])
def test_an_encoder_or_decoder_alone(prefix: str) -> None:
    for half in ("encoder", "decoder"):
        keys = (f"{half}.conv_in.weight", f"{half}.x.bias")
        assert autoencoder_tensors(tensors(1.0, prefix, keys), "it").keys() == set(keys)
    # a complete autoencoder is preferred to a part
    content = tensors(1.0, "net.vae.") | tensors(2.0, "aux.", ("decoder.conv_in.weight",))
    assert_found(content)


def test_similar_names_are_not_prefixes() -> None:
    content = tensors() | {"my_encoder.conv_in.weight": torch.zeros(1)}
    assert autoencoder_tensors(content, "it").keys() == {*KEYS, "my_encoder.conv_in.weight"}


@pytest.mark.parametrize("prefix", ["", "module.", "first_stage_model."])
def test_ema_of_latent_diffusion(prefix: str) -> None:
    content = tensors(1.0, prefix) | {prefix + key: x for key, x in shadows(2.0).items()}
    assert_found({"state_dict": content}, 2.0, ema=True)
    assert_found({"state_dict": content}, 1.0, ema=False)


def test_tensors_without_an_average_are_those_of_the_weights() -> None:
    average = shadows(2.0)
    del average["model_ema.encoderxbias"]
    content = tensors() | {"loss.logvar": torch.full((), 3.0)} | average
    found = autoencoder_tensors(content, "it")
    assert {key: float(x.mean()) for key, x in found.items()} == {
        **dict.fromkeys(KEYS, 2.0),
        "encoder.x.bias": 1.0,
        "loss.logvar": 3.0,
    }


@pytest.mark.parametrize(
    ("weights", "average"),
    [
        ("model", "ema"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("model", "EMA"),
        ("model", "modelEMA"),
        ("model", "ModelEma"),
        ("vae", "vae_ema"),
        ("ae", "ema_0.9999"),
        ("semantic", "ema"),
        ("remaining", "ema_model"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_an_average_beside_the_weights(weights: str, average: str, prefix: str) -> None:
    discriminator = {"conv_in.weight": torch.zeros(2)}
    content = {weights: tensors(1.0), average: tensors(2.0, prefix), "discriminator": discriminator}
    for ordered in (content, dict(reversed(content.items()))):
        assert_found(ordered, 2.0, ema=True)
        assert_found(ordered, 1.0, ema=False)


@pytest.mark.parametrize("prefix", ["ema.", "model_ema.module.", "ema_model.", "net_ema."])
def test_an_average_under_a_prefix_of_the_same_state_dict(prefix: str) -> None:
    for own in ("", "module.", "model."):
        content = tensors(1.0, own) | tensors(2.0, prefix)
        assert_found(content, 2.0, ema=True)
        assert_found(content, 1.0, ema=False)


def test_averaged_model_of_torch() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"conv_in": nn.Conv2d(1, 1, 1)})})
    average = AveragedModel(model)
    with torch.no_grad():
        model["encoder"]["conv_in"].weight.zero_()  # type: ignore[index]
    content = {"model": model.state_dict(), "ema": average.state_dict(), "step": 3}
    for ema in (True, False):
        found = autoencoder_tensors(content, "it", ema)
        assert found.keys() == model.state_dict().keys()
        assert bool(found["encoder.conv_in.weight"].any()) == ema


@pytest.mark.parametrize(
    "content",
    [
        {"ema_model": tensors()},
        {"ema": {"state_dict": tensors(prefix="module.")}},
        tensors(prefix="ema."),
        {"state_dict": tensors(prefix="model_ema.")},
    ],
)
@pytest.mark.parametrize("ema", [True, False])
def test_a_file_with_only_the_average(content: object, ema: bool) -> None:
    assert_found(content, ema=ema)


def test_loss_tensors_are_kept_with_an_average() -> None:
    content = {"model": tensors() | {"loss.logvar": torch.zeros(())}, "ema": tensors(2.0)}
    for ema in (True, False):
        found = autoencoder_tensors(content, "it", ema)
        assert found.keys() == {*KEYS, "loss.logvar"}


def test_the_outermost_state_dict_is_preferred() -> None:
    content = {"best": {"model": tensors(2.0)}, "model": tensors(1.0)}
    assert_found(content)
    assert_found(dict(reversed(content.items())))


@pytest.mark.parametrize("ema", [True, False])
def test_weights_and_average_may_share_tensors(ema: bool) -> None:
    shared = tensors()
    assert_found({"ema": shared, "model": shared}, ema=ema)


@pytest.mark.parametrize("width", [1, 50])
def test_recursive_mappings_terminate(width: int) -> None:
    start = time.monotonic()
    content: dict[str, Any] = {"x": 1}
    content |= dict.fromkeys(map(str, range(width)), content)
    with pytest.raises(ValueError, match=mentions("it:", "tensors", "state dict")):
        autoencoder_tensors(content, "it")
    content["inner"] = {"outer": content, "model": tensors()}
    assert_found(content)
    assert time.monotonic() - start < 1.0  # not 50 ** 4 steps


def test_select_maps_names_to_keys_of_the_file() -> None:
    keys = [f"module.{key}" for key in KEYS] + ["module.model_ema.encoderconv_inweight", "step"]
    assert select(keys, ema=False) == {key: f"module.{key}" for key in KEYS}
    assert select(iter(keys)) == {
        **{key: f"module.{key}" for key in KEYS},
        "encoder.conv_in.weight": "module.model_ema.encoderconv_inweight",
    }
    assert select([]) == {}
    assert select(["", ".", "..encoder.conv_in.weight"]) == {
        "encoder.conv_in.weight": "..encoder.conv_in.weight"
    }


def test_run_time_with_many_autoencoders() -> None:
    keys = [f"{i}.encoder.{x}" for i in range(20_000) for x in ("conv_in.weight", "x.bias")]
    own = {"encoder.conv_in.weight": "encoder.conv_in.weight", "12": "12"}
    start = time.monotonic()
    assert select([*keys, *own]) == own
    assert time.monotonic() - start < 5.0
