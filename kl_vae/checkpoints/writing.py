"""Write an autoencoder's weights for others: one CompVis file, or a folder of diffusers'."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_vae.checkpoints.diffusers import batch_norm, config_of_params, to_diffusers
from kl_vae.checkpoints.folders import CONFIG, WEIGHTS
from kl_vae.checkpoints.reading import METADATA
from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from kl_vae.runtime.files import write_atomically, write_folder_atomically

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_compvis(
    out: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any], dtype: str = "fp32"
) -> None:
    """Write one safetensors file with the original names, as ComfyUI and LDM trainers read it.

    Its metadata hold `params`, by which we know what tensors do not tell.

    Args:
        out: the file to write, .safetensors.
        tensors: of an autoencoder alone.
        params: its whole `model.params`.
        dtype: fp32, fp16 or bf16.

    Raises:
        ValueError: `out` exists, has another suffix or cannot be written, weights that fp16 cannot
            hold, or safetensors is not installed.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: name it {out.stem}.safetensors, since that is what is written")
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
    """Write a folder that `diffusers.AutoencoderKL.from_pretrained` loads.

    Args:
        out: the folder to make.
        tensors: of an autoencoder alone; `colorize` has no place there, and is left out.
        params: its whole `model.params`.
        dtype: fp32, fp16 or bf16.

    Raises:
        ValueError: diffusers cannot express the model, `out` exists or cannot be written, weights
            that fp16 cannot hold, or safetensors is not installed.
    """
    _check_new(out)
    config = config_of_params(params)
    latents = params.get("latents")
    if latents is None:
        logger.warning(
            "%s: the scale of its latents is not known, so scaling_factor=1.0 is written; measure "
            "it first, with kl-vae encode --statistics",
            out,
        )
    modules = {key: x for key, x in tensors.items() if key != "colorize"}
    named = _cast(to_diffusers(modules), dtype)
    if "batch_norm_eps" in config:
        assert latents is not None
        named |= batch_norm(latents)  # statistics, which stay float32
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
    except OSError as error:  # a name too long, a folder that may not be read
        raise ValueError(f"{out}: cannot be written ({error}); choose another place") from None
    if exists or not out.name:  # the working directory, which cannot be replaced
        raise ValueError(f"{out}: exists; name one that does not")


def _cast(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: give one of {', '.join(DTYPES)}")
    cast = {}
    for key, x in tensors.items():
        cast[key] = x.detach().to("cpu", DTYPES[dtype]).contiguous()
        if not cast[key].isfinite().all():
            largest = x.abs().max().item()
            mend = "write bf16 or fp32" if x.isfinite().all() else "mend the weights"
            raise ValueError(f"{key}: {dtype} cannot hold its values (up to {largest:g}); {mend}")
    return cast
