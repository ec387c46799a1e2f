"""Write the weights of an autoencoder for other libraries, or alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kl_vae.checkpoints.export import export_checkpoint, write_export
from kl_vae.inference.load import read_model
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.config_file import load_model_params

Layout = Literal["compvis", "diffusers"]


@dataclass(frozen=True)
class ConversionResult:
    """What `convert` wrote.

    Attributes:
        path: the file or folder.
        parameters: number of parameters.
    """

    path: Path
    parameters: int


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote.

    Attributes:
        path: the file.
        weights: which weights they are, in words: averaged or not, of which step.
    """

    path: Path
    weights: str


def convert(
    checkpoint: str | Path | AutoEncoderKL,
    out: str | Path,
    to: Layout,
    *,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    config: str | None = None,
    ema: bool = True,
) -> ConversionResult:
    """Write an autoencoder's weights in the layout of another library.

    Args:
        checkpoint: what `AutoEncoderKL.from_checkpoint` takes, or a model.
        out: compvis: a file to write, .safetensors; diffusers: a folder to make.
        to: compvis: one file with the original names (latent-diffusion, ComfyUI); diffusers: a
            folder for `AutoencoderKL.from_pretrained`.
        dtype: of the weights there.
        config: a config file or the name of a shipped config; None: as the checkpoint says.
        ema: take the moving average of the weights, where the checkpoint has one.

    Raises:
        ValueError: no autoencoder there, the layout cannot express it, or `out` exists or cannot be
            written.
    """
    if to not in get_args(Layout):
        raise ValueError(f"to={to!r}: give one of {', '.join(get_args(Layout))}")
    if isinstance(checkpoint, AutoEncoderKL):
        model = checkpoint.without_loss()
    else:
        model = read_model(str(checkpoint), config, ema)
    save = model.save_compvis if to == "compvis" else model.save_pretrained
    save(out, dtype)
    return ConversionResult(Path(out), sum(x.numel() for x in model.parameters()))


def export(
    checkpoint: str | Path | AutoEncoderKL,
    out: str | Path,
    *,
    config: str | None = None,
    ema: bool = True,
) -> ExportResult:
    """Write a checkpoint's weights and architecture alone, without optimisers and losses.

    Args:
        checkpoint: what `AutoEncoderKL.from_checkpoint` takes, or a model.
        out: the file to write, .pt.
        config: a config file or the name of a shipped config; None: as the checkpoint says.
        ema: take the moving average of the weights, where the checkpoint has one.

    Raises:
        ValueError: no autoencoder there, or `out` exists or cannot be written.
    """
    out = Path(out)
    if isinstance(checkpoint, AutoEncoderKL):
        tensors = {key: x.cpu() for key, x in checkpoint.without_loss().state_dict().items()}
        write_export(out, tensors, checkpoint.params)
        return ExportResult(out, f"weights ({len(tensors)} tensors)")
    given = None if config is None else load_model_params(config)
    return ExportResult(out, export_checkpoint(str(checkpoint), out, ema=ema, given=given))
