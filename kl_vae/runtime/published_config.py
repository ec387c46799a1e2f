"""Translate configs of latent-diffusion (LDM) and generative-models (sgm) into this package's keys.

Both nest `{target: CLASS, params: {...}}`. The autoencoder is the model itself, or the
`first_stage_config` of a diffusion model, whose `scale_factor` is the scale of the latents.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kl_vae.runtime.schema import plain, show

logger = logging.getLogger(__name__)

ConfigSource = str | Path | Mapping[str, Any]  # a YAML file, the name of a shipped config, its keys

# for a config that states no length, as in the shipped kl-*-published
PUBLISHED_STEPS = 200_000

# last parts of the dotted names of an autoencoder's class
_AUTOENCODERS = (
    "AutoEncoderKL",
    "AutoencoderKL",
    "AutoencoderKLInferenceWrapper",
    "AutoencoderKLModeOnly",
    "AutoencodingEngine",
    "AutoencodingEngineLegacy",
)
_CODERS = {"encoder_config": "Encoder", "decoder_config": "Decoder"}
_REGULARIZER = "DiagonalGaussianRegularizer"
_OF_ENCODER, _OF_DECODER = {"in_channels", "double_z"}, {"out_ch", "tanh_out", "give_pre_end"}
_MONITORS = {"loss/rec": "rec_loss", "loss/nll": "nll_loss", "loss/total": "total_loss"}
_ATTENTION = {"vanilla-xformers": "vanilla"}  # the same function and weights

# keys of model.params that are not used here, and what to write instead
_NOT_USED = {
    "image_key": "data.train.root names the images",
    "input_key": "data.train.root names the images",
    "ema_decay": "write training.ema_decay",
    "ckpt_engine": "write model.params.ckpt_path",
    "optimizer_config": "write optimizer",
    "lr_g_factor": "write optimizer.learning_rate and discriminator_optimizer.learning_rate",
    "trainable_ae_params": "write training.freeze",
    "ae_optimizer_args": "write optimizer",
    "trainable_disc_params": "write optimizer",
    "disc_optimizer_args": "write discriminator_optimizer",
    "disc_start_iter": "write model.params.lossconfig.params.disc_start",
    "max_batch_size": "write training.accumulate_batches",
    "additional_decode_keys": "a decoder takes the latents alone",
    "diff_boost_factor": "it is for images in a log",
}
_USUAL = {"image_key": ("image",), "input_key": ("jpg",), "disc_start_iter": (0,)}

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_MAX_REFERENCES = 1000  # references to references may double the size each time
_MAX_DEPTH = 50


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the original code trains: values of its config.

    Attributes:
        base_learning_rate: of Adam; None: not stated.
        per_image: the rate is multiplied by the images of the global batch (LDM, not sgm).
        betas: of Adam.
        batch_size: images per GPU.
        accumulate: batches per step.
        length: `max_steps` or `epochs`, if stated.
    """

    base_learning_rate: Any
    per_image: bool
    betas: tuple[float, float]
    batch_size: Any
    accumulate: Any
    length: dict[str, Any]


def translate(config: Mapping[str, Any]) -> tuple[dict[str, Any], Recipe | None]:
    """Return a config with this package's keys, and the recipe of an original config.

    Args:
        config: a config of this package, LDM or sgm: whole, or its `model` section, or its
            `model.params`. References such as `${model.params.embed_dim}` are resolved.

    Raises:
        ValueError: it is of another model, or a reference cannot be resolved; names the key.
    """
    translated, recipe = _translate(config)
    _check_resolved(translated)
    return translated, recipe


def model_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `model.params` of a config that `translate` takes.

    Raises:
        ValueError: see `translate`; or it has no model.params.
    """
    params = section_at(_translate(config)[0], "model").get("params")
    if not isinstance(params, dict):
        raise ValueError("has no model.params; give the config of an autoencoder")
    _check_resolved(params)
    return params


def _translate(config: Mapping[str, Any]) -> tuple[dict[str, Any], Recipe | None]:
    config = _resolve(plain(config))
    if "model" not in config:
        if {"ddconfig", "embed_dim", "encoder_config", "first_stage_config"} & config.keys():
            config = {"model": {"params": config}}
        elif {"target", "params"} <= config.keys():
            names = ("target", "params", "base_learning_rate")
            config["model"] = {name: config.pop(name) for name in names if name in config}
    path = "model"
    if "first_stage_config" in section_at(config, "model.params"):
        path = "model.params.first_stage_config"
        _take_first_stage(config)
    target = section_at(config, "model").pop("target", "AutoEncoderKL")
    if not isinstance(target, str) or target.rpartition(".")[2] not in _AUTOENCODERS:
        raise ValueError(
            f"{path}.target={show(target)}: not a KL autoencoder; give the config of one of "
            f"{', '.join(_AUTOENCODERS)}"
        )
    _translate_params(section_at(config, "model.params"), f"{path}.params")
    return config, _take_recipe(config, of_sgm=target.startswith("sgm."))


def section_at(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the section at a key path; empty where there is none."""
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, dict) else {}


def _take_first_stage(config: dict[str, Any]) -> None:
    """Replace a diffusion model by its autoencoder, whose latents it scales."""
    diffusion = section_at(config, "model.params")
    stage = diffusion["first_stage_config"]
    if not isinstance(stage, dict) or not isinstance(stage.get("params"), dict):
        raise ValueError(
            f"model.params.first_stage_config={show(stage)}: has no params; give the config of an "
            "autoencoder"
        )
    for key in ("data", "lightning"):
        if key == "lightning" or "target" in section_at(config, key):
            config.pop(key, None)  # of the diffusion model, as is its learning rate
    scale = diffusion.get("scale_factor")
    if diffusion.get("scale_by_std"):
        logger.info("model.params.scale_by_std: the scale of the latents is not in the config")
    elif scale is not None:
        stage["params"].setdefault("latents", {"scale_factor": scale})
    config["model"] = {"target": stage.get("target", ""), "params": stage["params"]}


def _translate_params(params: dict[str, Any], path: str) -> None:
    """Rename the keys of sgm's autoencoders in place; those without effect are named in the log."""
    if "loss_config" in params:
        if "lossconfig" in params:
            raise ValueError(f"{path}.loss_config: lossconfig is given as well; keep one of them")
        params["lossconfig"] = params.pop("loss_config")
    if _CODERS.keys() & params.keys():
        if "ddconfig" in params:
            raise ValueError(
                f"{path}.ddconfig: {' and '.join(_CODERS)} are given as well; keep one of them"
            )
        params["ddconfig"] = _ddconfig(params, path)
        params.setdefault("embed_dim", None)  # without quant convolutions
    regularizer = params.pop("regularizer_config", None)
    if regularizer is not None:
        _check_target(regularizer, _REGULARIZER, f"{path}.regularizer_config")
    ddconfig = section_at(params, "ddconfig")
    if "attn_type" in ddconfig:
        attn_type = ddconfig["attn_type"]
        ddconfig["attn_type"] = _ATTENTION.get(str(attn_type), attn_type)
    split, _, metric = str(params.get("monitor")).partition("/")
    if metric in _MONITORS:
        params["monitor"] = f"{split}/{_MONITORS[metric]}"
    for key in _NOT_USED.keys() & params.keys():
        value = params.pop(key)
        if value is not None and value not in _USUAL.get(key, ()):
            logger.warning("%s.%s is not used: %s", path, key, _NOT_USED[key])


def _ddconfig(params: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the ddconfig that an encoder_config and a decoder_config have in common."""
    coders = {}
    for key, name in _CODERS.items():
        coder = params.pop(key, None)
        _check_target(coder, name, f"{path}.{key}")
        if not isinstance(coder.get("params"), dict):
            raise ValueError(
                f"{path}.{key}.params={show(coder.get('params'))}: expected a ddconfig"
            )
        coders[key] = coder["params"]
    encoder, decoder = coders.values()
    for key in (encoder.keys() & decoder.keys()) - _OF_ENCODER - _OF_DECODER:
        if encoder[key] != decoder[key]:
            raise ValueError(
                f"{path}.decoder_config.params.{key}={show(decoder[key])}: the encoder has "
                f"{show(encoder[key])}; both must have the same {key}"
            )
    ours = {key: value for key, value in encoder.items() if key not in _OF_DECODER}
    return {**encoder, **decoder, **ours}


def _check_target(value: Any, name: str, path: str) -> None:
    target = value.get("target") if isinstance(value, dict) else value
    if not isinstance(target, str) or target.rpartition(".")[2] != name:
        raise ValueError(f"{path}.target={show(target)}: not supported; only {name} is")


# --- references between keys


class _Unresolved(str):
    """A text with a reference that cannot be resolved, which matters only if its key is used."""

    problem: str


def _check_resolved(value: Any) -> None:
    """Raise ValueError for the first reference that could not be resolved."""
    if isinstance(value, _Unresolved):
        raise ValueError(value.problem)
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_resolved(inner)


def _resolve(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config in which references such as `${model.params.embed_dim}` are values.

    A name with leading dots is relative: `.x` is beside the key, `..x` beside its section.
    """
    left = _MAX_REFERENCES

    def resolve(value: Any, path: tuple[str, ...], via: tuple[tuple[str, ...], ...]) -> Any:
        if isinstance(value, dict):
            return {key: resolve(inner, (*path, str(key)), via) for key, inner in value.items()}
        if isinstance(value, list):
            return [resolve(inner, (*path, str(i)), via) for i, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            found = [look_up(name, path, via) for name in _REFERENCE.findall(value)]
            if _REFERENCE.fullmatch(value):
                return found[0]
            for inner in found:
                if isinstance(inner, _Unresolved):
                    return inner
            parts = iter(found)
            text = _REFERENCE.sub(lambda _: str(next(parts)), value)
            if "${" not in text:
                return text
            problem = "it is not a reference ${KEY.PATH}"
        except ValueError as error:
            problem = str(error)
        unresolved = _Unresolved(value)
        unresolved.problem = f"{'.'.join(path)}={show(value)}: {problem}; write the value itself"
        return unresolved

    def look_up(name: str, path: tuple[str, ...], via: tuple[tuple[str, ...], ...]) -> Any:
        nonlocal left
        left -= 1
        if path in via or len(via) > _MAX_DEPTH or left < 0:
            raise ValueError("it refers to itself, or there are too many references")
        if ":" in name:
            raise ValueError("only keys of this config can be referred to")
        keys = re.sub(r"\[(\w+)\]", r".\1", name.strip())
        dots = len(keys) - len(keys.lstrip("."))
        if dots > len(path):
            raise ValueError(f"there is no key {name}")
        place = (*(path[:-dots] if dots else ()), *keys.lstrip(".").split("."))
        found: Any = config
        for key in place:
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"there is no key {name}") from None
        return resolve(found, place, (*via, path))

    return {key: resolve(value, (str(key),), ()) for key, value in config.items()}


# --- the original recipe


def _take_recipe(config: dict[str, Any], of_sgm: bool) -> Recipe | None:
    """Remove the sections of an original config that this package lacks; None: there are none."""
    model, data = section_at(config, "model"), section_at(config, "data")
    if not ("base_learning_rate" in model or "target" in data or "lightning" in config):
        return None
    loader = section_at(config, "data.params")
    places = ("data.params", "data.params.loader", "data.params.train.loader")
    sizes = (section_at(config, place).get("batch_size") for place in places)
    batch_size = next((size for size in sizes if size is not None), loader.get("batch_size", 32))
    trainer = section_at(config, "lightning.trainer")
    if "target" in data:
        logger.warning(
            "data.target=%s: of data only batch_size is used; data.train.root names the images",
            config.pop("data")["target"],
        )
    if config.pop("lightning", None) is not None:
        logger.warning(
            "lightning: only accumulate_grad_batches, max_steps and max_epochs of its trainer are "
            "used; docs/config.md has this package's keys"
        )
    return Recipe(
        base_learning_rate=model.pop("base_learning_rate", None),
        per_image=not of_sgm,
        betas=(0.9, 0.999) if of_sgm else (0.5, 0.9),
        batch_size=batch_size,
        accumulate=trainer.get("accumulate_grad_batches", 1),
        length={
            key: trainer[name]
            for key, name in (("max_steps", "max_steps"), ("epochs", "max_epochs"))
            if trainer.get(name) not in (None, 0, -1)  # -1: no limit
        },
    )


def fill_in(config: dict[str, Any], recipe: Recipe) -> None:
    """Set the published defaults of an original config in place; its own keys stay."""
    defaults: dict[str, dict[str, Any]] = {"data": {}, "training": {}, "optimizer": {}}
    resolution = section_at(config, "model.params.ddconfig").get("resolution")
    if resolution is not None and section_at(config, "data").get("crop") is None:
        defaults["data"] = {"resize": resolution}
    training = section_at(config, "training")
    if "global_batch_size" not in training:
        gpus = int(os.environ.get("WORLD_SIZE", "1"))
        images = _whole("data.params.batch_size", recipe.batch_size)
        images *= _whole("lightning.trainer.accumulate_grad_batches", recipe.accumulate) * gpus
        defaults["training"] = {
            "global_batch_size": images,
            "accumulate_batches": recipe.accumulate,
        }
    if not {"max_steps", "epochs"} & training.keys():
        defaults["training"] |= dict([*recipe.length.items(), ("max_steps", PUBLISHED_STEPS)][:1])
    images = training.get("global_batch_size") or defaults["training"]["global_batch_size"]
    own = section_at(config, "optimizer")
    if recipe.base_learning_rate is not None and own.get("name", "adam") == "adam":
        try:
            rate = float(recipe.base_learning_rate) * (float(images) if recipe.per_image else 1.0)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"model.base_learning_rate={show(recipe.base_learning_rate)}: expected a number; "
                "write optimizer.learning_rate=RATE"
            ) from None
        adam = {"learning_rate": rate, "eps": 1e-8, "clip_grad_norm": None}
        defaults["optimizer"] = {"name": "adam", "betas": list(recipe.betas), **adam}
        # the betas of discriminator_optimizer default to LDM's
        betas = {"betas": list(recipe.betas)} if recipe.betas != (0.5, 0.9) else {}
        defaults["discriminator_optimizer"] = {**adam, **betas}
    for key, values in defaults.items():
        section = config.get(key)
        if section is None or isinstance(section, dict):
            config[key] = values | (section or {})
    logger.info(
        "as published: %s",
        "; ".join(f"{key} {values}" for key, values in defaults.items() if values),
    )


def _whole(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{key}={show(value)}: expected a whole number; write training keys instead"
        )
    return value
