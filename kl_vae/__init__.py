"""A KL-regularised image autoencoder (the first stage of latent diffusion) in plain PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kl_vae.accel.accelerate import accelerate
    from kl_vae.attention import make_attention, register_attention
    from kl_vae.blocks import register_block, register_normalization
    from kl_vae.ddconfig import DDConfig
    from kl_vae.decoder import Decoder
    from kl_vae.distribution import DiagonalGaussianDistribution
    from kl_vae.encoder import Encoder
    from kl_vae.inference.convert import ConversionResult, ExportResult, convert, export
    from kl_vae.inference.encode import EncodingResult, encode_dataset
    from kl_vae.inference.evaluate import EvaluationResult, evaluate
    from kl_vae.inference.reconstruct import reconstruct
    from kl_vae.inference.reconstruction_report import ReconstructionResult
    from kl_vae.inference.sample import SamplingResult, sample
    from kl_vae.losses import register_loss
    from kl_vae.model import AutoEncoderKL, AutoencoderKL
    from kl_vae.runtime.imports import allow_import
    from kl_vae.training.loop import TrainingResult, train
    from kl_vae.visual.image_files import load_image, save_image
    from kl_vae.visual.report import report

__all__ = [
    "AutoEncoderKL",
    "AutoencoderKL",
    "ConversionResult",
    "DDConfig",
    "Decoder",
    "DiagonalGaussianDistribution",
    "Encoder",
    "EncodingResult",
    "EvaluationResult",
    "ExportResult",
    "ReconstructionResult",
    "SamplingResult",
    "TrainingResult",
    "__version__",
    "accelerate",
    "allow_import",
    "convert",
    "encode_dataset",
    "evaluate",
    "export",
    "load_image",
    "make_attention",
    "reconstruct",
    "register_attention",
    "register_block",
    "register_loss",
    "register_normalization",
    "report",
    "sample",
    "save_image",
    "train",
]

# imported on first use, so that `kl-vae --help` does not import torch
_MODULES = {
    "AutoEncoderKL": "model",
    "AutoencoderKL": "model",
    "ConversionResult": "inference.convert",
    "DDConfig": "ddconfig",
    "Decoder": "decoder",
    "DiagonalGaussianDistribution": "distribution",
    "Encoder": "encoder",
    "EncodingResult": "inference.encode",
    "EvaluationResult": "inference.evaluate",
    "ExportResult": "inference.convert",
    "ReconstructionResult": "inference.reconstruction_report",
    "SamplingResult": "inference.sample",
    "TrainingResult": "training.loop",
    "accelerate": "accel.accelerate",
    "allow_import": "runtime.imports",
    "convert": "inference.convert",
    "encode_dataset": "inference.encode",
    "evaluate": "inference.evaluate",
    "export": "inference.convert",
    "load_image": "visual.image_files",
    "make_attention": "attention",
    "reconstruct": "inference.reconstruct",
    "register_attention": "attention",
    "register_block": "blocks",
    "register_loss": "losses",
    "register_normalization": "blocks",
    "report": "visual.report",
    "sample": "inference.sample",
    "save_image": "visual.image_files",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
