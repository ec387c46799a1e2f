"""Configs of latent-diffusion and generative-models: which keys become ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import kl_vae
from kl_vae import AutoEncoderKL
from kl_vae.losses import LPIPSWithDiscriminator
from kl_vae.runtime.config_file import load_config, load_model_params
from kl_vae.runtime.published_config import model_params, translate
from kl_vae.training.config import RunConfig
from tests.messages import is_about, mentions
from tests.tiny import tiny_ddconfig, tiny_model

Config = dict[str, Any]
LDM = "ldm.models.autoencoder.AutoencoderKL"
SGM_LOSS = "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator"


def engine(**changes: Any) -> Config:
    """As sgm's configs/example_training/autoencoder, with a small model."""
    params: Config = {
        "input_key": "jpg",
        "monitor": "val/loss/rec",
        "disc_start_iter": 0,
        "encoder_config": {
            "target": "sgm.modules.diffusionmodules.model.Encoder",
            "params": tiny_ddconfig(attn_type="vanilla-xformers", double_z=True),
        },
        "decoder_config": {
            "target": "sgm.modules.diffusionmodules.model.Decoder",
            "params": "${model.params.encoder_config.params}",
        },
        "regularizer_config": {
            "target": "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"
        },
        "loss_config": {
            "target": SGM_LOSS,
            "params": {
                "perceptual_weight": 0.0,
                "disc_start": 20001,
                "learn_logvar": True,
                "regularization_weights": {"kl_loss": 0.5},
            },
        },
    }
    return {
        "model": {
            "base_learning_rate": 4.5e-6,
            "target": "sgm.models.autoencoder.AutoencodingEngine",
            "params": {**params, **changes},
        },
        "data": {
            "target": "sgm.data.dataset.StableDataModuleFromConfig",
            "params": {"train": {"loader": {"batch_size": 8}}},
        },
        "lightning": {"trainer": {"devices": "0,", "max_epochs": -1}},
    }


def first_stage(target: str = LDM) -> Config:
    params = {"embed_dim": 2, "monitor": "val/rec_loss", "ddconfig": tiny_ddconfig()}
    return {"target": target, "params": {**params, "lossconfig": {"target": "torch.nn.Identity"}}}


def diffusion(stage: Config | None = None, **changes: Any) -> Config:
    """As the configs of diffusion models, which hold their autoencoder."""
    params = {"scale_factor": 0.18215, "unet_config": {"target": "a.UNet", "params": {}}}
    model = {
        "base_learning_rate": 1.0e-4,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {**params, "first_stage_config": stage or first_stage(), **changes},
    }
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 64}}
    return {"model": model, "data": data, "lightning": {"trainer": {"max_epochs": 1000}}}


class Foreign(Mapping[str, Any]):
    """A config object that is no dict, and whose lists are no lists."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_ = values

    def __getitem__(self, key: str) -> Any:
        return wrap(self.values_[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


class ForeignList(Sequence[Any]):
    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return wrap(self.values[index])

    def __len__(self) -> int:
        return len(self.values)


def wrap(value: Any) -> Any:
    if isinstance(value, dict):
        return Foreign(value)
    return ForeignList(value) if isinstance(value, list) else value


def test_an_autoencoding_engine_of_sgm() -> None:
    model = AutoEncoderKL.from_config(engine())
    assert model.embed_dim is None  # no quant convolutions
    assert model.config.z_channels == 2
    assert model.config.attn_type == "vanilla"
    assert model.monitor == "val/rec_loss"
    loss = model.loss
    assert isinstance(loss, LPIPSWithDiscriminator)
    assert (loss.kl_weight, loss.disc_start, loss.logvar.requires_grad) == (0.5, 20001, True)


def test_the_kl_has_no_weight_in_sgm_unless_it_is_given() -> None:
    params = {"perceptual_weight": 0.0, "disc_start": 1}
    model = AutoEncoderKL.from_config(engine(loss_config={"target": SGM_LOSS, "params": params}))
    assert isinstance(model.loss, LPIPSWithDiscriminator)
    assert model.loss.kl_weight == 0.0


def test_the_rate_of_sgm_is_not_per_image(caplog: pytest.LogCaptureFixture) -> None:
    run = RunConfig.load(engine(), ["data.train.root=images"])
    assert run.training.global_batch_size == 8
    assert run.training.max_steps == 200_000
    for optimizer in (run.optimizer, run.discriminator_optimizer):
        assert optimizer.name == "adam"
        assert optimizer.learning_rate == 4.5e-6
        assert optimizer.betas == (0.9, 0.999)


@pytest.mark.parametrize(
    "target",
    [
        LDM,
        "ldm.models.autoencoder.AutoencoderKLInferenceWrapper",
        "sgm.models.autoencoder.AutoencoderKL",
        "sgm.models.autoencoder.AutoencodingEngineLegacy",
        "sgm.models.autoencoder.AutoencoderKLModeOnly",
    ],
)
def test_the_first_stage_of_a_diffusion_model(target: str) -> None:
    model = AutoEncoderKL.from_config(diffusion(first_stage(target)))
    assert model.latent_channels == 2
    assert model.loss is None
    assert model.latents is not None and model.latents.scale_factor == 0.18215
    config = load_config(diffusion(first_stage(target)))
    assert config.keys() == {"model"}  # rate, data and length are the diffusion model's


def test_a_scale_that_is_measured_later_is_not_stated() -> None:
    for changes in ({"scale_by_std": True, "scale_factor": 1.0}, {"scale_factor": None}):
        assert AutoEncoderKL.from_config(diffusion(**changes)).latents is None


def test_an_autoencoder_without_its_surroundings() -> None:
    for config in (first_stage(), first_stage()["params"], {"model": first_stage()}):
        assert AutoEncoderKL.from_config(config).latent_channels == 2


def test_config_objects_of_other_libraries(tmp_path: Path) -> None:
    config = diffusion()
    expected = AutoEncoderKL.from_config(config).params
    assert AutoEncoderKL.from_config(Foreign(config)).params == expected
    assert load_model_params(Foreign(config)) == load_model_params(config)
    run = RunConfig.load(Foreign(engine()), ["data.train.root=images"])
    assert run.model.params.ddconfig.ch_mult == (1, 1)
    ddconfig = Foreign(tiny_ddconfig())
    loss = Foreign({"target": "elbo", "params": {"kl_weight": 0.5}})
    assert AutoEncoderKL(ddconfig, 2, loss).params["ddconfig"] == expected["ddconfig"]
    path = tmp_path / "model.safetensors"
    tiny_model().save_compvis(path)
    model = AutoEncoderKL.from_checkpoint(path, Foreign(config))
    assert model.latents is not None and model.latents.scale_factor == 0.18215
    result = kl_vae.convert(path, tmp_path / "out.safetensors", "compvis", config=Foreign(config))
    written = AutoEncoderKL.from_checkpoint(result.path)
    assert written.latents is not None and written.latents.scale_factor == 0.18215


def test_a_config_object_without_a_value_is_an_error_with_its_key() -> None:
    class Missing(Foreign):
        def __getitem__(self, key: str) -> Any:
            if key == "embed_dim":
                raise RuntimeError("Missing mandatory value")
            return super().__getitem__(key)

    config = {"model": {"params": Missing({"embed_dim": None, "ddconfig": {}})}}
    with pytest.raises(ValueError, match=mentions("model.params.embed_dim", "Missing mandatory")):
        model_params(config)


def test_omegaconf_objects() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create(engine())
    assert AutoEncoderKL.from_config(config).params == AutoEncoderKL.from_config(engine()).params


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a: 1, b: '${a}'}", 1),
        ("{a: {c: [1, 2]}, b: '${a}'}", {"c": [1, 2]}),
        ("{a: {c: [1, 2]}, b: '${a.c[1]}'}", 2),
        ("{a: {c: [1, 2]}, b: '${a.c.0}'}", 1),
        ("{a: x, b: 'run-${a}-${a}'}", "run-x-x"),
        ("{a: x, c: '${a}', b: '${c}'}", "x"),
        ("{b: {c: 3, d: '${.c}'}}", {"c": 3, "d": 3}),
        ("{c: 3, b: {d: '${..c}'}}", {"d": 3}),
        ("{a: null, b: ['${a}']}", [None]),
    ],
)
def test_a_reference_is_the_value_that_it_names(text: str, expected: object) -> None:
    assert translate(yaml.safe_load(text))[0]["b"] == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{a: {b: '${none.such}'}}", ("a.b", "${none.such}", "none.such")),
        ("{a: ['${a[7]}']}", ("a.0", "${a[7]}")),
        ("{a: '${b}', b: '${a}'}", ("${b}", "itself")),
        ("{a: {b: '${a}'}}", ("a.b", "itself")),
        ("{a: '${oc.env:HOME}'}", ("a", "oc.env:HOME")),
        ("{a: '${...b}'}", ("a", "...b")),
        ("{a: 'x${'}", ("a", "x${")),
    ],
)
def test_a_reference_without_a_value_is_an_error_with_its_key(
    text: str, parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        translate(yaml.safe_load(text))


def test_references_that_double_are_limited() -> None:
    config: Config = {"x0": "y"}
    for i in range(60):
        config[f"x{i + 1}"] = f"${{x{i}}}${{x{i}}}"
    with pytest.raises(ValueError, match=mentions("too many")):
        translate(config)


def test_a_reference_elsewhere_does_not_matter_to_the_model() -> None:
    config = diffusion()
    config["data"]["params"]["root"] = "${oc.env:DATA}"
    assert model_params(config)["embed_dim"] == 2
    translate(config)  # data is the diffusion model's


def test_a_file_with_references(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(yaml.safe_dump(engine()))
    assert AutoEncoderKL.from_config(path).params == AutoEncoderKL.from_config(engine()).params
    path.write_text(yaml.safe_dump(engine(embed_dim="${model.params.none}")))
    with pytest.raises(ValueError, match=mentions(path, "model.params.embed_dim")):
        load_model_params(path)


def coder(name: str, **changes: Any) -> Config:
    return {"target": f"sgm.modules.{name}", "params": tiny_ddconfig(**changes)}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"decoder_config": coder("Decoder", ch=64)}, ("decoder_config.params.ch=64", 32)),
        ({"decoder_config": coder("VideoDecoder")}, ("decoder_config.target", "VideoDecoder")),
        ({"decoder_config": None}, ("decoder_config.target=None", "Decoder")),
        ({"encoder_config": {"target": "a.Encoder"}}, ("encoder_config.params=None",)),
        ({"ddconfig": tiny_ddconfig()}, ("ddconfig", "encoder_config")),
        ({"lossconfig": {"target": "elbo"}}, ("loss_config", "lossconfig")),
        (
            {"regularizer_config": {"target": "sgm.quantize.VectorQuantizer"}},
            ("regularizer_config.target", "VectorQuantizer"),
        ),
        ({"no_such_key": 1}, ("model.params.no_such_key",)),
    ],
)
def test_engines_that_are_not_supported(changes: Config, parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        AutoEncoderKL.from_config(engine(**changes))


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        (
            first_stage("ldm.models.autoencoder.VQModelInterface"),
            ("model.params.first_stage_config.target", "VQModelInterface"),
        ),
        ({"params": {}}, ("model.params.first_stage_config.target=''",)),
        ({"target": LDM}, ("model.params.first_stage_config", "params")),
        ({"target": LDM, "params": 3}, ("model.params.first_stage_config", "params")),
    ],
)
def test_first_stages_that_are_no_kl_autoencoder(stage: Config, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        AutoEncoderKL.from_config(diffusion(stage))


def test_keys_that_are_not_used_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kl_vae"):
        AutoEncoderKL.from_config({"model": engine(ema_decay=0.999, lr_g_factor=None)["model"]})
    unused = [message for message in caplog.messages if "model.params" in message]
    assert len(unused) == 1
    assert is_about(unused[0], "model.params.ema_decay", "training.ema_decay")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model": {"target": "a" * 10_000}}, "model.target="),
        (diffusion(stage={"params": "a" * 10_000}), "model.params.first_stage_config="),
        ({"model": {"params": {"embed_dim": "${x}" * 3000}}}, "model.params.embed_dim="),
    ],
)
def test_values_in_messages_are_short(config: Config, key: str) -> None:
    with pytest.raises(ValueError, match=mentions(key)) as caught:
        load_config(config)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_a_learning_rate_beyond_floats_is_named() -> None:
    config = engine()
    config["model"]["base_learning_rate"] = 10**400
    with pytest.raises(ValueError, match=mentions("model.base_learning_rate=")):
        load_config(config)
