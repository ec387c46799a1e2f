"""Which files of a folder hold an autoencoder, and its config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name
CONFIG = "config.json"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
INDEX = f"{WEIGHTS}.safetensors.index.json"  # says which shard holds which tensor
WEIGHT_FILES = (  # the first that is there is taken
    f"{WEIGHTS}.safetensors",
    INDEX,
    f"{WEIGHTS}.bin",
    f"{WEIGHTS}.fp16.safetensors",
    f"{WEIGHTS}.fp16.bin",
)
_MAX_JSON_BYTES = 1 << 24


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: it is none, too large, or cannot be read.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"over {_MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); copy it again") from None
    return content


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
    """The files that an index names, all of them in its folder."""
    weight_map = read_json(index).get("weight_map")
    names: Iterable[Any] = weight_map.values() if isinstance(weight_map, dict) else ()
    files = sorted({str(name) for name in names})
    beside = {path.name for path in index.parent.iterdir() if path.is_file()}
    lacking = [repr(name) for name in files if name not in beside]
    if lacking or not files:
        what = f"{lacking[0]:.80}, which does not lie" if lacking else "no files"
        raise ValueError(f"{index}: its weight_map names {what} beside it; copy the folder again")
    return [index.parent / name for name in files]
