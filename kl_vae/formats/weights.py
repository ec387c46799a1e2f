"""Read the state dict of a checkpoint file, whatever it is wrapped in."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# what trainers put around a state dict, and before its keys
_WRAPPERS = ("model", "state_dict")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_EMA = "ema"  # beside "model" in our checkpoints
_PIPELINE_PREFIX = "first_stage_model."


def read_file(path: str | Path) -> Any:
    """Load a file of torch's with `weights_only=True`, on the CPU.

    Raises:
        ValueError: no such file, not a file of torch's, truncated, or one that holds more than
            tensors and plain values (which is never unpickled).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}; give an existing file or run directory")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on its own old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: not a checkpoint of tensors and plain values ({reason}); nothing in it was "
            "executed; export its state_dict alone with torch.save"
        ) from None
    except Exception as error:  # on damaged bytes torch fails in any way, IndexError too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({reason}); is the file whole? "
            "Copy or download it again"
        ) from None


def state_dict_of(content: object, source: str, ema: bool = True) -> dict[str, Tensor]:
    """Return the autoencoder's tensors of a loaded file, without wrappers and prefixes.

    Args:
        content: of the file.
        source: its name, for errors.
        ema: take the moving average of the weights, where the file is a checkpoint with one.

    Raises:
        ValueError: there is no state dict in it.
    """
    average = content.get(_EMA) if ema and isinstance(content, Mapping) else None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: holds {type(content).__name__}, not a state dict")
    if isinstance(average, Mapping):
        content = {**content, **average}  # a loss has no average
    tensors = {str(key): x for key, x in content.items() if isinstance(x, Tensor)}
    if not tensors:
        raise ValueError(f"{source}: holds no tensors; give a file with a state dict")
    return strip_prefixes(tensors)


def strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what DDP, torch.compile and whole pipelines put before an autoencoder's keys.

    Where `first_stage_model.` marks the autoencoder within a pipeline, the rest is left out.
    """
    stripped = dict(tensors)
    for prefix in _WRAPPER_PREFIXES * 2:  # compiled DDP and DDP of a compiled model
        stripped = {key.removeprefix(prefix): x for key, x in stripped.items()}
    if any(key.startswith(_PIPELINE_PREFIX) for key in stripped):
        stripped = {
            key.removeprefix(_PIPELINE_PREFIX): x
            for key, x in stripped.items()
            if key.startswith(_PIPELINE_PREFIX)
        }
    return stripped
