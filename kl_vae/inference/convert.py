"""Conversion of an autoencoder's weights to other layouts, and export without training state."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kl_vae.checkpoints.export import export_checkpoint, write_export
from kl_vae.inference.load import read_model
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.config_file import load_model_params
from kl_vae.runtime.files import display_name
from kl_vae.runtime.published_config import ConfigSource

Layout = Literal["compvis", "diffusers"]


@dataclass(frozen=True)
class ConversionResult:
    """Result of `convert`.

    Attributes:
        path: the file or folder written.
        parameters: number of parameters.
    """

    path: Path
    parameters: int


@dataclass(frozen=True)
class ExportResult:
    """Result of `export`.

    Attributes:
        path: the file written.
        weights: description of the weights: averaged or not, and their training step.
    """

    path: Path
    weights: str


def convert(
    checkpoint: str | Path | AutoEncoderKL,
    out: str | Path,
    to: Layout,
    *,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    config: ConfigSource | None = None,
    ema: bool = True,
    overwrite: bool = False,
) -> ConversionResult:
    """Write an autoencoder's weights in the layout of another library.

    Args:
        checkpoint: a checkpoint accepted by `AutoEncoderKL.from_checkpoint`, or a model.
        out: a new .safetensors file for `compvis`, a new folder for `diffusers`.
        to: `compvis`: one file with the original key names (latent-diffusion, ComfyUI);
            `diffusers`: a folder for `AutoencoderKL.from_pretrained`.
        dtype: data type of the written weights.
        config: a config (a file, a shipped name, or keys); None: taken from the checkpoint.
        ema: use the EMA weights if the checkpoint has them.
        overwrite: replace an existing result; never the checkpoint itself or a file in it.

    Raises:
        ValueError: the checkpoint holds no autoencoder, the layout cannot represent it, or `out`
            exists, is being written by another process or cannot be written.
    """
    if to not in get_args(Layout):
        raise ValueError(f"to={to!r}: give one of {', '.join(get_args(Layout))}")
    _check_not_input(checkpoint, Path(out))
    if isinstance(checkpoint, AutoEncoderKL):
        model = checkpoint.without_loss()
    else:
        model = read_model(str(checkpoint), config, ema)
    save = model.save_compvis if to == "compvis" else model.save_pretrained
    save(out, dtype, overwrite=overwrite)
    return ConversionResult(Path(out), sum(x.numel() for x in model.parameters()))


def export(
    checkpoint: str | Path | AutoEncoderKL,
    out: str | Path,
    *,
    config: ConfigSource | None = None,
    ema: bool = True,
    overwrite: bool = False,
) -> ExportResult:
    """Write a checkpoint's weights and architecture, without optimisers and losses.

    Args:
        checkpoint: a checkpoint accepted by `AutoEncoderKL.from_checkpoint`, or a model.
        out: the .pt file to write.
        config: a config (a file, a shipped name, or keys); None: taken from the checkpoint.
        ema: use the EMA weights if the checkpoint has them.
        overwrite: replace an existing result; never the checkpoint itself or a file in it.

    Raises:
        ValueError: the checkpoint holds no autoencoder, or `out` exists, is being written
            by another process or cannot be written.
    """
    out = Path(out)
    _check_not_input(checkpoint, out)
    if isinstance(checkpoint, AutoEncoderKL):
        tensors = {key: x.cpu() for key, x in checkpoint.without_loss().state_dict().items()}
        write_export(out, tensors, checkpoint.params, overwrite=overwrite)
        return ExportResult(out, f"weights ({len(tensors)} tensors)")
    given = None if config is None else load_model_params(config)
    weights = export_checkpoint(str(checkpoint), out, ema=ema, given=given, overwrite=overwrite)
    return ExportResult(out, weights)


def _check_not_input(checkpoint: str | Path | AutoEncoderKL, out: Path) -> None:
    """Raise ValueError if the output exists and is the checkpoint that is read, or a file in it."""
    if isinstance(checkpoint, AutoEncoderKL) or not (os.path.exists(checkpoint) and out.exists()):
        return
    resolved = out.resolve()
    if any(path.samefile(checkpoint) for path in (resolved, *resolved.parents)):
        raise ValueError(
            f"{display_name(out)}: is part of the checkpoint {display_name(checkpoint)}, which is "
            "not overwritten; give another path"
        )
