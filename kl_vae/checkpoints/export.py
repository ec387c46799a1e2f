"""Export of an autoencoder to a kl_vae checkpoint, a CompVis file or a diffusers folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_vae.checkpoints.diffusers import (
    CONFIG,
    WEIGHTS,
    batch_norm,
    config_of_params,
    to_diffusers,
    weight_files,
)
from kl_vae.checkpoints.pretrained import complete_params
from kl_vae.checkpoints.reading import METADATA, read_weights
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from kl_vae.runtime.files import (
    flush_file,
    remove_temporaries,
    write_atomically,
    write_folder_atomically,
)
from kl_vae.runtime.locks import hold_lock

logger = logging.getLogger(__name__)

# all that `write_diffusers` writes into a folder
_DIFFUSERS_FILE = re.compile(rf"{CONFIG}|{WEIGHTS}[\w.-]*\.(safetensors|json)")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_checkpoint(
    source: str | Path,
    out: Path,
    ema: bool = True,
    given: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Export the weights and the config of an autoencoder to a kl_vae checkpoint.

    Args:
        source: as in `read_weights`.
        out: the file to write.
        ema: export the moving average of the weights, if there is one.
        given: as in `complete_params`.
        overwrite: replace an existing file.

    Returns:
        A description of the exported weights.

    Raises:
        ValueError: `source` contains no autoencoder, or `out` exists or cannot be written.
    """
    weights = read_weights(source, ema)
    params = complete_params(weights, given)
    for key in ("ddconfig", "latents"):
        params[key] = params[key] and dataclasses.asdict(params[key])
    tensors = {key: x for key, x in weights.tensors.items() if not key.startswith("loss.")}
    write_export(out, tensors, params, weights.step, weights.pixel_range, overwrite)
    kind = "averaged weights" if weights.averaged else "weights"
    step = "" if weights.step is None else f" of step {weights.step}"
    return f"{kind}{step} ({len(tensors)} tensors)"


def write_export(
    out: Path,
    tensors: Mapping[str, Tensor],
    params: Mapping[str, Any],
    step: int | None = None,
    pixel_range: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a kl_vae checkpoint that contains only an autoencoder.

    Args:
        out: the file to write.
        tensors: state dict in the CompVis layout, without a loss.
        params: `model.params` as plain values.
        step: training step; None: unknown.
        pixel_range: `data.range` of the images that it was trained on; None: not stated.
        overwrite: replace an existing file.

    Raises:
        ValueError: `out` exists, cannot be written, or is being written by another process; or a
            tensor is not finite.
    """
    for key, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{key}: contains NaN or infinity; use other weights")
    config = {"model": {"params": params}, "data": {"range": pixel_range}}
    with _place_for_file(out, overwrite):
        write_checkpoint(out, {"model": dict(tensors), "config": config, "step": step})


def write_compvis(
    out: Path,
    tensors: Mapping[str, Tensor],
    params: Mapping[str, Any],
    dtype: str = "fp32",
    overwrite: bool = False,
) -> None:
    """Write a safetensors file in the CompVis layout, for ComfyUI and LDM trainers.

    `params` is stored in the metadata, because the tensors do not determine all of it.

    Args:
        out: the .safetensors file to write.
        tensors: state dict of an autoencoder, without a loss.
        params: complete `model.params`.
        dtype: fp32, fp16 or bf16.
        overwrite: replace an existing file.

    Raises:
        ValueError: `out` exists, has another suffix or cannot be written, `dtype` is unknown or
            cannot represent the weights, or safetensors is not installed.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the output is a safetensors file; use {out.stem}.safetensors")
    with _place_for_file(out, overwrite):
        metadata = {"format": "pt", METADATA: json.dumps({"model": {"params": params}})}
        content = safetensors_bytes(_cast(tensors, dtype), metadata)
        write_atomically(out, lambda file: file.write(content))


def write_diffusers(
    out: Path,
    tensors: Mapping[str, Tensor],
    params: Mapping[str, Any],
    dtype: str = "fp32",
    overwrite: bool = False,
    *,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
) -> None:
    """Write a diffusers folder for `diffusers.AutoencoderKL.from_pretrained`.

    Args:
        out: the folder to create.
        tensors: state dict of an autoencoder, without a loss; `colorize` is not exported.
        params: complete `model.params`.
        dtype: fp32, fp16 or bf16.
        overwrite: replace a diffusers folder of an autoencoder.
        max_shard_size: largest size of a file, in bytes or as in "500MB" or "2GiB", above which
            the weights are divided into several files; None: one file.
        variant: part of the file names, such as fp16, by which `from_pretrained` selects them.

    Raises:
        ValueError: diffusers does not support the model, `out` exists or cannot be written, `dtype`
            is unknown or cannot represent the weights, or safetensors is not installed.
    """

    def write(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            flush_file(folder / name)
        for path in filter(_is_ours, out.iterdir() if out.is_dir() else ()):
            path.unlink()  # only an empty folder can be replaced

    with _place(out):
        _check_new_folder(out, overwrite)
        contents = _diffusers_files(out, tensors, params, dtype, max_shard_size, variant)
        write_folder_atomically(out, write)


def _diffusers_files(
    out: Path,
    tensors: Mapping[str, Tensor],
    params: Mapping[str, Any],
    dtype: str,
    max_shard_size: int | str | None,
    variant: str | None,
) -> dict[str, bytes]:
    """Return the files of a diffusers folder."""
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", variant):
        raise ValueError(f"variant={variant!r}: give letters, digits, _ and -, such as fp16")
    limit = None if max_shard_size is None else _bytes_of(max_shard_size)
    config = config_of_params(params)
    latents = params.get("latents")
    if latents is None:
        logger.warning(
            "%s: the scale of the latents is unknown; writing scaling_factor=1.0. Measure it with "
            "kl-vae encode --statistics before exporting",
            out,
        )
    modules = {key: x for key, x in tensors.items() if key != "colorize"}
    named = _cast(to_diffusers(modules), dtype)
    if "batch_norm_eps" in config:
        assert latents is not None
        named |= batch_norm(latents)  # statistics remain float32
    shards = _shards(named, limit)
    whole, index, *_ = weight_files(variant or "")
    names = [whole]
    if len(shards) > 1:
        stem = whole.removesuffix(".safetensors")
        names = [
            f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        ]
    contents = {
        name: safetensors_bytes(shard, {"format": "pt"})
        for name, shard in zip(names, shards, strict=True)
    }
    contents[CONFIG] = _json_bytes(config)
    if len(shards) > 1:
        contents[index] = _json_bytes(
            {
                "metadata": {"total_size": sum(x.nbytes for x in named.values())},
                "weight_map": {
                    key: name for name, shard in zip(names, shards, strict=True) for key in shard
                },
            }
        )
    return contents


@contextmanager
def _place(out: Path) -> Iterator[None]:
    """Context manager that makes the folder of `out`, and keeps other processes from writing `out`.

    Temporary files of killed processes beside `out` are removed.

    Raises:
        ValueError: another process writes `out`, or it cannot be written.
    """
    if not out.name:  # "." has no name, and cannot be replaced
        raise ValueError(f"{out}: already exists; give another path")
    # short: `out` may have the longest name that there is
    digest = hashlib.blake2b(os.fsencode(out.name), digest_size=8).hexdigest()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(out.with_name(f".{digest}.lock")):
            remove_temporaries(out.parent)
            yield
    except BlockingIOError:
        raise ValueError(
            f"{out}: another process is writing it; wait until it ends, or give another path"
        ) from None
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error}); choose another place") from None


def _shards(tensors: Mapping[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    """Divide tensors, in order, into parts of at most `limit` bytes, or of one larger tensor."""
    shards: list[dict[str, Tensor]] = [{}]
    for key, x in tensors.items():
        held = sum(y.nbytes for y in shards[-1].values())
        if limit is not None and shards[-1] and held + x.nbytes > limit:
            shards.append({})
        shards[-1][key] = x
    return shards


def _bytes_of(size: int | str) -> int:
    """Return a size in bytes: a number, or a text such as 500MB or 2GiB.

    Raises:
        ValueError: the size is not valid.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", str(size).strip().upper())
    number = 0
    if match is not None and type(size) in (int, str):
        base = 1024 if match[3] else 1000
        number = int(float(match[1]) * base ** ("KMGT".find(match[2]) + 1 if match[2] else 0))
    if number < 1:
        raise ValueError(f"max_shard_size={size!r}: give bytes, or a size such as '500MB'")
    return number


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


@contextmanager
def _place_for_file(out: Path, overwrite: bool) -> Iterator[None]:
    """`_place` for a new file, or one that is replaced."""
    with _place(out):
        _check_new_file(out, overwrite)
        yield


def _check_new_file(out: Path, overwrite: bool) -> None:
    try:
        exists, is_folder = out.exists(), out.is_dir()
    except OSError as error:  # such as a name that is too long, or missing permissions
        raise ValueError(f"{out}: cannot be written ({error}); choose another place") from None
    if is_folder:
        raise ValueError(f"{out}: already exists (Is a directory); give another path")
    if exists and not overwrite:
        raise ValueError(f"{out}: already exists; give --overwrite to replace it, or another path")


def _check_new_folder(out: Path, overwrite: bool) -> None:
    try:
        files = list(out.iterdir()) if out.is_dir() else []
        exists = out.exists() and not out.is_dir()
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error}); choose another place") from None
    if exists or not all(map(_is_ours, files)):
        raise ValueError(f"{out}: already exists, with other content; give another path")
    if files and not overwrite:
        raise ValueError(f"{out}: already exists; give --overwrite to replace it, or another path")


def _is_ours(path: Path) -> bool:
    """Return whether a file in a diffusers folder is one that `write_diffusers` writes."""
    return _DIFFUSERS_FILE.fullmatch(path.name) is not None and not path.is_dir()


def _cast(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: give one of {', '.join(DTYPES)}")
    cast = {}
    for key, x in tensors.items():
        cast[key] = x.detach().to("cpu", DTYPES[dtype]).contiguous()
        if not cast[key].isfinite().all():
            largest = x.abs().max().item()
            fix = "use bf16 or fp32" if x.isfinite().all() else "use weights that are finite"
            raise ValueError(
                f"{key}: {dtype} cannot represent its values (up to {largest:g}); {fix}"
            )
    return cast
