"""The autoencoder's tensors within whatever a file holds: wrappers, prefixes, averages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

# an autoencoder of either layout has these two
_ENCODER, _DECODER = "encoder.conv_in.weight", "decoder.conv_in.weight"

# parts of a key that wrappers of modules add, wherever in the model they stand
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PIPELINES = ("", "module.", "first_stage_model.", "vae.")  # taken before any other prefix
_AVERAGE = re.compile(r"EMA|Ema(?![a-z])|(?<![A-Za-z])ema(?![a-z])")  # not the one of "semantic"
_SHADOW = "model_ema."  # latent-diffusion's averages: the parameters' names without points
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
