"""Read the weights of an autoencoder from any file, folder or run, in any layout."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kl_vae.checkpoints.diffusers import (
    CONFIG,
    EPS,
    INDEX,
    WEIGHT_FILES,
    from_diffusers,
    is_diffusers,
    params_of_config,
    read_json,
    shard_names,
    take_batch_norm,
    with_kernels,
    with_quant_convolutions,
)
from kl_vae.checkpoints.hub import SUFFIXES, fetch, is_hub_name
from kl_vae.checkpoints.run_files import check_digest, is_checkpoint, is_run, read_chosen
from kl_vae.checkpoints.safetensors_file import is_safetensors, read_safetensors
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
    """Read an autoencoder's weights, in whatever layout and wrapping they are stored.

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
    contents = [_read_file(file, ema) for file in files]
    first = contents[0]
    tensors = {key: x for content in contents for key, x in content.tensors.items()}
    size = sum(content.path.stat().st_size for content in contents)
    check_within_file(tensors, size, str(source))
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


def _read_file(path: Path, ema: bool) -> _Content:
    if path.is_file() and is_safetensors(path):
        check_digest(path)
        return _read_safetensors(path, ema)
    path, content = read_chosen(path, mmap=True)
    tensors = autoencoder_tensors(content, str(path), ema)
    if not is_checkpoint(content):
        return _Content(path, tensors)
    step = content.get("step")
    return _Content(
        path,
        tensors,
        config=content.get("config"),
        step=step if type(step) is int else None,
        averaged=ema and content.get("ema") is not None,
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
    """Return `model.params` of a config, or None."""
    for key in ("model", "params"):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else None


# --- which files of a folder


class FolderContent(NamedTuple):
    """An autoencoder's files."""

    weights: list[Path]  # several, where they are sharded
    config: dict[str, Any] | None  # of diffusers
    source: Path  # what errors name


def find_autoencoder(folder: Path, ema: bool = True) -> FolderContent:
    """Find the files of diffusers' folders, of whole pipelines, and of folders with one file.

    Args:
        folder: one without the checkpoints of a run.
        ema: of a trainer's folder that holds averaged weights as well, those.

    Raises:
        ValueError: no weights in it, or several of which none has diffusers' name.
    """
    trained = ("autoencoderkl_ema", "autoencoderkl") if ema else ("autoencoderkl",)
    for place in (folder, *(folder / name for name in ("vae", *trained))):
        if (place / CONFIG).is_file():
            config = read_json(place / CONFIG)
            # a pipeline may have a config.json of something else beside its folders
            if place != folder or str(config.get("_class_name", "Auto")).startswith("Auto"):
                return FolderContent(_weights_of(place), config, place)
    files = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES and path.is_file())
    if len(files) == 1:
        return FolderContent(files, None, files[0])
    if files:
        names = ", ".join(path.name for path in files[:5])
        raise ValueError(f"{folder}: holds {len(files)} files of weights ({names}); name one")
    raise ValueError(f"{folder}: no checkpoint in it; give a run directory or a file")


def _weights_of(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return _shards(path) if name == INDEX else [path]
    raise ValueError(
        f"{folder}: a {CONFIG} and no weights; one of {', '.join(WEIGHT_FILES[:3])} belongs beside "
        "it"
    )


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, all of which must lie beside it."""
    names = shard_names(index)
    beside = {path.name for path in index.parent.iterdir() if path.is_file()}
    lacking = [repr(name) for name in names if name not in beside]
    if lacking or not names:
        what = f"{lacking[0]:.80}, which does not lie" if lacking else "no files"
        raise ValueError(f"{index}: its weight_map names {what} beside it; copy the folder again")
    return [index.parent / name for name in names]


# --- which tensors of a file

# an autoencoder of either layout has these two
_ENCODER, _DECODER = "encoder.conv_in.weight", "decoder.conv_in.weight"

# parts of a key that wrappers of modules add, anywhere in the model
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PIPELINES = ("", "module.", "first_stage_model.", "vae.")  # taken before any other prefix
_AVERAGE = re.compile(r"EMA|Ema(?![a-z])|(?<![A-Za-z])ema(?![a-z])")  # not the one of "semantic"
_SHADOW = "model_ema."  # latent-diffusion's averages: the parameters' names without dots
_DEPTH = 4  # of mappings within mappings


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
    """Yield each mapping with an autoencoder's tensors, outermost first; else each with any."""
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
    """Yield each mapping with tensors, and the keys that lead to it, outermost first."""
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
    """Return what precedes the keys of each autoencoder."""
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
    """Return the keys that begin with one of the prefixes, in time n log n of both."""
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
