"""Export of an autoencoder to a kl_vae checkpoint, a CompVis file or a diffusers folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
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
)
from kl_vae.checkpoints.pretrained import complete_params
from kl_vae.checkpoints.reading import METADATA, read_weights
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from kl_vae.runtime.files import write_atomically, write_folder_atomically

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_checkpoint(
    source: str | Path, out: Path, ema: bool = True, given: Mapping[str, Any] | None = None
) -> str:
    """Export the weights and the config of an autoencoder to a kl_vae checkpoint.

    Args:
        source: as in `read_weights`.
        out: the file to write.
        ema: export the moving average of the weights, if there is one.
        given: as in `complete_params`.

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
    write_export(out, tensors, params, weights.step, weights.pixel_range)
    kind = "averaged weights" if weights.averaged else "weights"
    step = "" if weights.step is None else f" of step {weights.step}"
    return f"{kind}{step} ({len(tensors)} tensors)"


def write_export(
    out: Path,
    tensors: Mapping[str, Tensor],
    params: Mapping[str, Any],
    step: int | None = None,
    pixel_range: Any = None,
) -> None:
    """Write a kl_vae checkpoint that contains only an autoencoder.

    Args:
        out: the file to write.
        tensors: state dict in the CompVis layout, without a loss.
        params: `model.params` as plain values.
        step: training step; None: unknown.
        pixel_range: `data.range` of the images that it was trained on; None: not stated.

    Raises:
        ValueError: `out` exists or cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out}: already exists; give another path")
    config = {"model": {"params": params}, "data": {"range": pixel_range}}
    try:
        write_checkpoint(out, {"model": dict(tensors), "config": config, "step": step})
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error}); choose another place") from None


def write_compvis(
    out: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any], dtype: str = "fp32"
) -> None:
    """Write a safetensors file in the CompVis layout, for ComfyUI and LDM trainers.

    `params` is stored in the metadata, because the tensors do not determine all of it.

    Args:
        out: the .safetensors file to write.
        tensors: state dict of an autoencoder, without a loss.
        params: complete `model.params`.
        dtype: fp32, fp16 or bf16.

    Raises:
        ValueError: `out` exists, has another suffix or cannot be written, `dtype` is unknown or
            cannot represent the weights, or safetensors is not installed.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the output is a safetensors file; use {out.stem}.safetensors")
    _check_new(out)
    metadata = {"format": "pt", METADATA: json.dumps({"model": {"params": params}})}
    content = safetensors_bytes(_cast(tensors, dtype), metadata)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda file: file.write(content))
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error}); choose another place") from None


def write_diffusers(
    out: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any], dtype: str = "fp32"
) -> None:
    """Write a diffusers folder for `diffusers.AutoencoderKL.from_pretrained`.

    Args:
        out: the folder to create.
        tensors: state dict of an autoencoder, without a loss; `colorize` is not exported.
        params: complete `model.params`.
        dtype: fp32, fp16 or bf16.

    Raises:
        ValueError: diffusers does not support the model, `out` exists or cannot be written, `dtype`
            is unknown or cannot represent the weights, or safetensors is not installed.
    """
    _check_new(out)
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
    content = safetensors_bytes(named, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"

    def write(folder: Path) -> None:
        (folder / CONFIG).write_text(text, encoding="utf-8")
        (folder / f"{WEIGHTS}.safetensors").write_bytes(content)

    try:
        write_folder_atomically(out, write)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error}); choose another place") from None


def _check_new(out: Path) -> None:
    try:
        exists = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:  # such as a name that is too long, or missing permissions
        raise ValueError(f"{out}: cannot be written ({error}); choose another place") from None
    if exists or not out.name:  # "." has no name, and cannot be replaced
        raise ValueError(f"{out}: already exists; give another path")


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
