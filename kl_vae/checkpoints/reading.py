"""Read the weights of an autoencoder from any file: layouts, wrappers, prefixes, averages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kl_vae.checkpoints.checkpoint import check_digest, is_checkpoint
from kl_vae.checkpoints.diffusers import (
    EPS,
    from_diffusers,
    is_diffusers,
    params_of_config,
    take_batch_norm,
    with_kernels,
    with_quant_convolutions,
)
from kl_vae.checkpoints.folders import CONFIG, find_autoencoder
from kl_vae.checkpoints.hub import fetch, is_hub_name
from kl_vae.checkpoints.run_directory import is_run, read_chosen
from kl_vae.checkpoints.safetensors_file import is_safetensors, read_safetensors
from kl_vae.checkpoints.torch_file import check_within_file

# an autoencoder of either layout has these two
_ENCODER, _DECODER = "encoder.conv_in.weight", "decoder.conv_in.weight"

# parts of a key that wrappers of modules add, wherever in the model they stand
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PIPELINES = ("", "module.", "first_stage_model.", "vae.")  # taken before any other prefix
_AVERAGE = re.compile(r"EMA|Ema(?![a-z])|(?<![A-Za-z])ema(?![a-z])")  # not the one of "semantic"
_SHADOW = "model_ema."  # latent-diffusion's averages: the parameters' names without points
_DEPTH = 4  # of mappings within mappings
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


def autoencoder_tensors(content: object, source: str, ema: bool = True) -> dict[str, Tensor]:
    """Return the autoencoder's tensors of a loaded file, without wrappers and prefixes.

    Args:
        content: of the file.
        source: its name, for errors.
        ema: take the moving average of the weights, where there is one; what it lacks (a loss) is
            taken from the weights.

    Raises:
        ValueError: there is no state dict in it.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: holds {type(content).__name__}, not a state dict")
    raw: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}
    for path, tensors in _state_dicts(content):
        found = average if any(_AVERAGE.search(str(name)) for name in path) else raw
        if not found:  # the outermost, of several
            found.update({key: tensors[name] for key, name in select(tensors, ema).items()})
    if not raw and not average:
        raise ValueError(f"{source}: holds no tensors; give a file with a state dict")
    return {**raw, **average} if ema or not raw else raw


def select(keys: Iterable[str], ema: bool = True) -> dict[str, str]:
    """Choose the autoencoder's keys among a file's: {key of the autoencoder: key of the file}.

    What DDP, torch.compile and whole pipelines put before the keys is removed; where such a prefix
    marks the autoencoder within a pipeline, the rest is left out, and so are other autoencoders.
    """
    bare = {_without_wrappers(key): key for key in keys}
    prefixes = _prefixes(bare)
    prefix = _choose(prefixes, bare, ema)
    others = {other for other in prefixes if other.startswith(prefix)} - {prefix}
    left_out = _under(others, bare)
    chosen = {
        key.removeprefix(prefix): name
        for key, name in bare.items()
        if key.startswith(prefix) and key not in left_out
    }
    shadows = {key: name for key, name in chosen.items() if key.startswith(_SHADOW)}
    weights = {key: name for key, name in chosen.items() if key not in shadows}
    if ema:
        for key in weights:
            shadow = shadows.get(_SHADOW + key.replace(".", ""))
            weights[key] = weights[key] if shadow is None else shadow
    return weights


def _state_dicts(
    content: Mapping[Any, Any],
) -> Iterator[tuple[tuple[Any, ...], dict[str, Tensor]]]:
    """Each mapping with tensors of an autoencoder, outermost first; else each with any tensor."""
    found = list(_mappings(content))
    with_autoencoder = [
        (path, tensors)
        for path, tensors in found
        if any(key.endswith((_ENCODER, _DECODER)) for key in tensors)
    ]
    yield from with_autoencoder or found


def _mappings(
    content: Mapping[Any, Any],
) -> Iterator[tuple[tuple[Any, ...], dict[str, Tensor]]]:
    """Each mapping with tensors, under the keys that lead to it, outermost first."""
    queue: list[tuple[tuple[Any, ...], Mapping[Any, Any]]] = [((), content)]
    seen = set()  # a file's mappings may hold one another
    for path, mapping in queue:
        if id(mapping) in seen:
            continue
        seen.add(id(mapping))
        tensors = {str(key): x for key, x in mapping.items() if isinstance(x, Tensor)}
        if tensors:
            yield path, tensors
        if len(path) < _DEPTH:
            inner = ((key, x) for key, x in mapping.items() if isinstance(x, Mapping))
            queue.extend(((*path, key), x) for key, x in inner)


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _prefixes(keys: Iterable[str]) -> set[str]:
    """What stands before the keys of each autoencoder."""
    encoders, decoders = (_beginnings(keys, end) for end in (_ENCODER, _DECODER))
    # both, or of a file that holds a half of one alone, either
    return encoders & decoders or encoders | decoders


def _choose(prefixes: set[str], keys: Iterable[str], ema: bool) -> str:
    averaged = {prefix for prefix in prefixes if _AVERAGE.search(prefix)}
    prefixes = averaged if averaged and (ema or averaged == prefixes) else prefixes - averaged
    if prefixes:
        return min(prefixes, key=lambda prefix: (prefix not in _PIPELINES, len(prefix), prefix))
    # of other tensors, those of a wrapped module
    return "module." if all(key.startswith("module.") for key in keys) else ""


def _under(prefixes: set[str], keys: Iterable[str]) -> set[str]:
    """Those of the keys that begin with one of the prefixes, however many there are of both."""
    under, found = None, set()
    for key in sorted(prefixes.union(keys)):  # a prefix stands before all that it begins
        if under is None or not key.startswith(under):
            under = key if key in prefixes else None
        if under is not None:
            found.add(key)
    return found


def _beginnings(keys: Iterable[str], end: str) -> set[str]:
    beginnings = {key[: -len(end)] for key in keys if key.endswith(end)}
    return {beginning for beginning in beginnings if not beginning or beginning.endswith(".")}
