"""Reading of autoencoder weights from files, folders and runs, in all supported layouts."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kl_vae.checkpoints.diffusers import (
    CONFIG,
    EPS,
    NON_EMA,
    VARIANTS,
    from_diffusers,
    is_diffusers,
    params_of_config,
    read_json,
    shard_names,
    take_batch_norm,
    variant_of,
    weight_files,
    with_published_attention,
    with_quant_convolutions,
)
from kl_vae.checkpoints.hub import SUFFIXES, fetch, is_hub_name
from kl_vae.checkpoints.run_files import check_digest, is_checkpoint, is_run, read_chosen
from kl_vae.checkpoints.safetensors_file import is_safetensors, read_safetensors
from kl_vae.checkpoints.torch_file import check_within_file

logger = logging.getLogger(__name__)

METADATA = "kl_vae"  # metadata key of exported safetensors files; its value is the config as JSON


class Weights(NamedTuple):
    """Tensors and metadata of an autoencoder."""

    tensors: dict[str, Tensor]  # CompVis layout, memory-mapped copy-on-write
    params: Mapping[str, Any] | None  # `model.params`, if stored
    latents: Mapping[str, Any] | None  # `model.params.latents`, if stored as a batch norm
    files: tuple[Path, ...]  # files that contain the tensors
    source: str  # the file or folder in messages
    step: int | None  # training step of a run
    averaged: bool  # whether the tensors are the moving average of a run
    pixel_range: Any = None  # `data.range` of the images that it was trained on, if stated


def read_weights(path: str | Path, ema: bool = True) -> Weights:
    """Read the weights of an autoencoder in any supported layout; no code in files is executed.

    Args:
        path: a run directory (its best checkpoint, otherwise its newest), a kl_vae checkpoint, a
            torch.save or safetensors file of an autoencoder or a pipeline, a diffusers folder (of
            an autoencoder, or of a pipeline with `vae/`), or `hf://ORG/NAME[/SUBFOLDER]`.
        ema: read the moving average of the weights, if there is one.

    Raises:
        ValueError: The path does not exist, or the file is damaged, unsafe, or not an autoencoder.
    """
    path = fetch(path) if is_hub_name(path) else Path(path)
    files, config, source = [path], _config_beside(path), path
    if path.is_dir() and not is_run(path):
        files, config, source = find_autoencoder(path, ema)
    elif path.name.endswith(".index.json"):
        files = _shards(path)
    contents = [_read_file(file, ema) for file in files]
    first = contents[0]
    tensors = {key: x for content in contents for key, x in content.tensors.items()}
    size = sum(content.path.stat().st_size for content in contents)
    check_within_file(tensors, size, str(source))
    tensors = with_quant_convolutions(tensors)
    tensors = (
        from_diffusers(tensors) if is_diffusers(tensors) else with_published_attention(tensors)
    )
    params, eps = _section(first.config, "model", "params"), EPS
    params = params if isinstance(params, Mapping) else None
    if config is not None:
        folder = source if source.is_dir() else source.parent
        params = params_of_config(config, str(folder / CONFIG))
        eps = config.get("batch_norm_eps", EPS)
    tensors, latents = take_batch_norm(tensors, eps)
    name = str(source if config is not None else first.path)
    tensors = _without_others(tensors, name)
    paths = tuple(content.path for content in contents)
    pixel_range = _section(first.config, "data", "range")
    return Weights(tensors, params, latents, paths, name, first.step, first.averaged, pixel_range)


class _Content(NamedTuple):
    """Content of one file."""

    path: Path
    tensors: dict[str, Tensor]  # of the autoencoder, without prefixes, in any layout
    config: object = None  # of a run or an export
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
    chosen: dict[str, str] = {}  # key of the autoencoder to key of the file

    def choose(keys: list[str]) -> list[str]:
        chosen.update(select(keys, ema))
        return list(chosen.values())

    content = read_safetensors(path, choose)
    if not chosen:
        raise ValueError(f"{path}: contains no tensors; give a file with a state dict")
    try:
        config = json.loads(content.metadata.get(METADATA, "null"))
    except (ValueError, RecursionError):
        config = None  # written by other software
    return _Content(path, {key: content.tensors[name] for key, name in chosen.items()}, config)


def _section(config: object, *keys: str) -> Any:
    """Return a value of a nested config, or None."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


# --- select the files of a folder


class FolderContent(NamedTuple):
    """Files of an autoencoder."""

    weights: list[Path]  # several if sharded
    config: dict[str, Any] | None  # diffusers config
    source: Path  # the file or folder in error messages


def find_autoencoder(folder: Path, ema: bool = True) -> FolderContent:
    """Find the weights in a diffusers folder, a pipeline folder, or a folder with one weight file.

    Args:
        folder: a folder that is not a run directory.
        ema: use the averaged weights of a trainer's folder that contains both.

    Raises:
        ValueError: The folder has no weights, or several files without a diffusers name.
    """
    trained = ("autoencoderkl_ema", "autoencoderkl") if ema else ("autoencoderkl",)
    for place in (folder, *(folder / name for name in ("vae", *trained))):
        if (place / CONFIG).is_file():
            config = read_json(place / CONFIG)
            # the config.json in a pipeline's folder may be that of another model
            default = "" if "architectures" in config else "Auto"  # of a model of transformers
            if place != folder or str(config.get("_class_name", default)).startswith("Auto"):
                return FolderContent(_weights_of(place, ema), config, place)
    files = _weight_files_in(folder)
    if len(files) == 1:
        return FolderContent(files, None, files[0])
    if files:
        raise ValueError(
            f"{folder}: contains {len(files)} weight files ({_names(files)}); give one"
        )
    image = next((path for path in islice(folder.rglob("*"), 10_000) if _is_image(path)), None)
    if image is not None:
        raise ValueError(
            f"{folder}: a folder of images ({image.name}), which contains no checkpoint; give "
            "a run directory or a file of weights, and images with --images"
        )
    raise ValueError(f"{folder}: contains no checkpoint; give a run directory or a file")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in (
        ".png",
        ".jpg",
        ".jpeg",
        ".webp",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
    )


def _weights_of(folder: Path, ema: bool) -> list[Path]:
    """Return the weights next to a diffusers config: by a name of diffusers, or the only file."""
    there = {path.name: path for path in folder.iterdir() if path.is_file()}
    found = {variant for name in there if (variant := variant_of(name)) is not None}
    preferred = VARIANTS if ema else (NON_EMA, *VARIANTS)
    unknown = sorted(found.difference(VARIANTS))
    for variant in (*preferred, *(unknown if len(unknown) == 1 else ())):
        for name in weight_files(variant):
            if name in there:
                return _shards(there[name]) if name.endswith(".json") else [there[name]]
    files = _weight_files_in(folder)
    if len(files) == 1:
        return files
    named = f" with a name of diffusers ({_names(files)})" if files else ""
    raise ValueError(
        f"{folder}: contains a {CONFIG} but no weights{named}; add one of "
        f"{', '.join(weight_files()[:3])}, or give a file"
    )


def _weight_files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES and path.is_file())


def _names(files: list[Path]) -> str:
    return ", ".join(path.name for path in files[:5]) + ", ..." * (len(files) > 5)


def _config_beside(file: Path) -> dict[str, Any] | None:
    """Return the config of an autoencoder next to a file of weights, if it is that file's.

    It is if the file has a name of diffusers, or is the only file of weights in the folder.
    """
    path = file.parent / CONFIG
    if not file.is_file() or not path.is_file():
        return None
    if variant_of(file.name) is None and _weight_files_in(file.parent) != [file]:
        return None
    config = read_json(path)
    return config if str(config.get("_class_name")).startswith("Autoencoder") else None


def _shards(index: Path) -> list[Path]:
    """Return the files listed in an index, which must all be in its folder."""
    names = shard_names(index)
    beside = {path.name for path in index.parent.iterdir() if path.is_file()}
    missing = [repr(name) for name in names if name not in beside]
    if missing or not names:
        problem = f"{missing[0]:.80}, which is not in its folder" if missing else "no files"
        raise ValueError(f"{index}: its weight_map lists {problem}; copy the folder again")
    return [index.parent / name for name in names]


# --- select the tensors of a file

# in every autoencoder, in both layouts
_ENCODER, _DECODER = "encoder.conv_in.weight", "decoder.conv_in.weight"

# first parts of the keys of an autoencoder, and of a VQ autoencoder, which is refused
_PARTS = {"encoder", "decoder", "quant_conv", "post_quant_conv", "colorize", "loss", "quantize"}

# parts of a key that module wrappers add anywhere
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PIPELINES = ("", "module.", "first_stage_model.", "vae.")  # preferred prefixes
_AVERAGE = re.compile(r"EMA|Ema(?![a-z])|(?<![A-Za-z])ema(?![a-z])")  # but not in "semantic"
_SHADOW = "model_ema."  # averages of latent-diffusion; followed by parameter names without dots
_DEPTH = 4  # maximum depth of nested mappings


def autoencoder_tensors(content: object, source: str, ema: bool = True) -> dict[str, Tensor]:
    """Return the tensors of the autoencoder in a loaded file, without wrappers and prefixes.

    Args:
        content: content of the file.
        source: name of the file in error messages.
        ema: use the moving average of the weights, if there is one, and the raw weights for tensors
            that it does not contain (those of a loss).

    Raises:
        ValueError: The file contains no state dict.
    """
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{source}: contains {type(content).__name__}, not a state dict; save a state dict"
        )
    raw: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}
    for path, tensors in _state_dicts(content):
        found = average if any(_AVERAGE.search(str(name)) for name in path) else raw
        if not found:  # use the outermost
            found.update({key: tensors[name] for key, name in select(tensors, ema).items()})
    if not raw and not average:
        raise ValueError(f"{source}: contains no tensors; give a file with a state dict")
    return {**raw, **average} if ema or not raw else raw


def _without_others(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Set aside the tensors of other models next to an autoencoder, with one log line.

    Trainers save their discriminator, a foundation model or a second average with it.
    """
    if not {_ENCODER, _DECODER} <= tensors.keys():
        return tensors
    others = [key for key in tensors if key.partition(".")[0] not in _PARTS]
    if others:
        parts = sorted({ascii(key.partition(".")[0])[1:-1] for key in others})
        logger.info(
            "%s: %d tensors of other models set aside: %s%s",
            source,
            len(others),
            ", ".join(parts[:5]),
            ", ..." * (len(parts) > 5),
        )
    return {key: x for key, x in tensors.items() if key.partition(".")[0] in _PARTS}


def select(keys: Iterable[str], ema: bool = True) -> dict[str, str]:
    """Select the keys of the autoencoder in a file: {key of the autoencoder: key of the file}.

    Prefixes of DDP, torch.compile and pipelines are removed. In a pipeline, the tensors of other
    models and of other autoencoders are ignored.
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
    """Yield mappings with tensors of an autoencoder, or with any tensors; outermost first."""
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
    """Yield (path of keys, tensors) of each mapping with tensors, outermost first."""
    queue: list[tuple[tuple[Any, ...], Mapping[Any, Any]]] = [((), content)]
    seen = set()  # mappings may contain each other
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
    """Return the prefix of each autoencoder."""
    encoders, decoders = (_beginnings(keys, end) for end in (_ENCODER, _DECODER))
    # a file may contain only an encoder or only a decoder
    return encoders & decoders or encoders | decoders


def _choose(prefixes: set[str], keys: Iterable[str], ema: bool) -> str:
    averaged = {prefix for prefix in prefixes if _AVERAGE.search(prefix)}
    prefixes = averaged if averaged and (ema or averaged == prefixes) else prefixes - averaged
    if prefixes:
        return min(prefixes, key=lambda prefix: (prefix not in _PIPELINES, len(prefix), prefix))
    # not an autoencoder: remove only the prefix of DDP
    return "module." if all(key.startswith("module.") for key in keys) else ""


def _under(prefixes: set[str], keys: Iterable[str]) -> set[str]:
    """Return the keys that begin with one of the prefixes, in O(n log n)."""
    under, found = None, set()
    for key in sorted(prefixes.union(keys)):  # a prefix sorts before the keys that begin with it
        if under is None or not key.startswith(under):
            under = key if key in prefixes else None
        if under is not None:
            found.add(key)
    return found


def _beginnings(keys: Iterable[str], end: str) -> set[str]:
    beginnings = {key[: -len(end)] for key in keys if key.endswith(end)}
    return {beginning for beginning in beginnings if not beginning or beginning.endswith(".")}
