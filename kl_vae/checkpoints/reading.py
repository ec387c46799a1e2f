"""Read the weights of an autoencoder from whatever people have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kl_vae.checkpoints.checkpoint import check_digest, is_checkpoint
from kl_vae.checkpoints.diffusers_config import params_of_config
from kl_vae.checkpoints.diffusers_layout import from_diffusers, is_diffusers, with_kernels
from kl_vae.checkpoints.flux2 import EPS, take_batch_norm, with_quant_convolutions
from kl_vae.checkpoints.folders import CONFIG, find_autoencoder
from kl_vae.checkpoints.hub import fetch, is_hub_name
from kl_vae.checkpoints.run_directory import is_run, read_chosen
from kl_vae.checkpoints.safetensors_file import is_safetensors, read_safetensors
from kl_vae.checkpoints.state_dicts import autoencoder_tensors, select
from kl_vae.checkpoints.torch_file import check_within_file

METADATA = "kl_vae"  # key in our safetensors files; its value is the config, as JSON


class Weights(NamedTuple):
    """An autoencoder's tensors, and what came with them."""

    tensors: dict[str, Tensor]  # of the CompVis layout, mapped: writing to them copies
    params: Mapping[str, Any] | None  # `model.params`, where they are said
    latents: Mapping[str, Any] | None  # `model.params.latents`, where a batch norm says it
    files: tuple[Path, ...]  # that hold them
    source: str  # the file or folder, for messages
    step: int | None  # of a run
    averaged: bool  # a run's moving average


def read_weights(path: str | Path, ema: bool = True) -> Weights:
    """Read an autoencoder's weights, in whatever layout and wrapping they lie there.

    Args:
        path: a run directory (its best checkpoint, else its newest), a checkpoint of ours, a file
            of torch's or a safetensors file of an autoencoder or a whole pipeline, a folder of
            diffusers' (or of a pipeline, with `vae/` in it), or `hf://ORG/NAME[/SUBFOLDER]`.
        ema: take the moving average of the weights, where there is one.

    Raises:
        ValueError: none there, damaged, not safe to read, or not of an autoencoder; nothing that
            lies in a file is executed.
    """
    path = fetch(path) if is_hub_name(path) else Path(path)
    files, config, source = [path], None, path
    if path.is_dir() and not is_run(path):
        files, config, source = find_autoencoder(path, ema)
    contents = [_read(file, ema) for file in files]
    first = contents[0]
    tensors = {key: x for content in contents for key, x in content.tensors.items()}
    check_within_file(tensors, sum(content.size for content in contents), str(source))
    tensors = with_quant_convolutions(tensors)
    tensors = from_diffusers(tensors) if is_diffusers(tensors) else with_kernels(tensors)
    params, eps = _params(first.config), EPS
    if config is not None:
        params = params_of_config(config, str(source / CONFIG))
        eps = config.get("batch_norm_eps", EPS)
    tensors, latents = take_batch_norm(tensors, eps)
    name = str(source if config is not None else first.path)
    paths = tuple(content.path for content in contents)
    return Weights(tensors, params, latents, paths, name, first.step, first.averaged)


class _Content(NamedTuple):
    """What one file holds."""

    path: Path
    tensors: dict[str, Tensor]  # the autoencoder's, without prefixes, in any layout
    config: object = None  # of a run, or of an export
    step: int | None = None
    averaged: bool = False

    @property
    def size(self) -> int:
        return self.path.stat().st_size


def _read(path: Path, ema: bool) -> _Content:
    if path.is_file() and is_safetensors(path):
        check_digest(path)
        return _read_safetensors(path, ema)
    path, content = read_chosen(path, mmap=True)
    tensors = autoencoder_tensors(content, str(path), ema)
    if not is_checkpoint(content):
        return _Content(path, tensors)
    step = content.get("step")
    averaged = ema and content.get("ema") is not None
    return _Content(
        path, tensors, content.get("config"), step if type(step) is int else None, averaged
    )


def _read_safetensors(path: Path, ema: bool) -> _Content:
    chosen: dict[str, str] = {}  # the autoencoder's key: the file's

    def choose(keys: list[str]) -> list[str]:
        chosen.update(select(keys, ema))
        return list(chosen.values())

    content = read_safetensors(path, choose)
    if not chosen:
        raise ValueError(f"{path}: holds no tensors; give a file with a state dict")
    try:
        config = json.loads(content.metadata.get(METADATA, "null"))
    except (ValueError, RecursionError):
        config = None  # not of ours
    return _Content(path, {key: content.tensors[name] for key, name in chosen.items()}, config)


def _params(config: object) -> Mapping[str, Any] | None:
    """`model.params` of a config, where there are any."""
    for key in ("model", "params"):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else None
