"""What is kept of a posterior.

B batch, z latent channels, h and w the latents' height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kl_vae.data.latent_shard import DTYPES
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.device import PRECISIONS
from kl_vae.runtime.randomness import generator_for

What = Literal["moments", "sample", "mode"]


@dataclass(frozen=True)
class EncodeConfig:
    """How images are encoded and what is kept of them.

    Attributes:
        what: moments (mean, then log variance), a sample of the posterior, or its mode.
        normalize: as the model's `normalize_latents` does.
        flip: encode the mirrored images as well.
        dtype: fp32, fp16 or bf16, of what is kept.
        shard_size: images a file.
        labels: keep the images' classes.
        seed: of samples; each also depends on its image's key, and on whether it is mirrored.
        batch_size: images that a process encodes at once.
        num_workers: processes that decode images, for each that encodes.
        precision: fp32, bf16 or fp16, of the encoder.
    """

    what: What = "moments"
    normalize: bool = False
    flip: bool = False
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    shard_size: int = 1024
    labels: bool = False
    seed: int = 0
    batch_size: int = 8
    num_workers: int = 4
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.what not in get_args(What):
            raise ValueError(f"what={self.what!r}: give one of {', '.join(get_args(What))}")
        for key, choices in (("dtype", DTYPES), ("precision", PRECISIONS)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r}: give one of {', '.join(choices)}")
        for key in ("shard_size", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: give at least 1")


def check_normalization(model: AutoEncoderKL, config: EncodeConfig) -> None:
    """Raise ValueError where latents are to be normalised and the model's scale is not known."""
    if config.normalize and model.latents is None:
        raise ValueError(
            "--normalize: the scale of this model's latents is not known; measure it with "
            "kl-vae encode --statistics FILE and give that FILE as --checkpoint, or store raw "
            "latents"
        )


def stored_latents(
    model: AutoEncoderKL,
    posterior: DiagonalGaussianDistribution,
    config: EncodeConfig,
    keys: Sequence[str],
    names: Sequence[str],
    view: str,
) -> Tensor:
    """What is kept of the posteriors of B images: [B, z, h, w], or [B, 2z, h, w], on the CPU.

    Normalised moments are those of the normalised latents: the log variance is shifted by
    2 log(scale).

    Args:
        model: that they are of.
        posterior: of B images.
        config: what is kept.
        keys: of the B images; with seed and view, what samples depend on.
        names: of the B images, for errors.
        view: latents, or flipped.

    Raises:
        ValueError: a value is beyond the range of the dtype.
    """
    if config.what == "sample":
        shape = posterior.mean.shape[1:]
        noise = [
            torch.randn(shape, generator=generator_for("encode", config.seed, key, view))
            for key in keys
        ]
        latents = posterior.sample(noise=torch.stack(noise))
    else:
        latents = posterior.mode()
    if config.normalize:
        latents = model.normalize_latents(latents)
    if config.what == "moments":
        latents = _moments(model, posterior, latents, config.normalize)
    stored = latents.cpu().to(DTYPES[config.dtype])
    finite = stored.flatten(1).isfinite().all(1).tolist()
    if not all(finite):
        bad = finite.index(False)
        raise ValueError(
            f"{names[bad]}: has a latent of {latents[bad].abs().max().item():.6g}, beyond what "
            f"{config.dtype} holds; give --dtype bf16 or fp32"
        )
    return stored


def _moments(
    model: AutoEncoderKL, posterior: DiagonalGaussianDistribution, mean: Tensor, normalized: bool
) -> Tensor:
    if not normalized:
        return posterior.parameters
    # std of raw latents, [1, z, h, w]; in float64, so that a large shift takes nothing from it
    one = torch.ones(posterior.mean.shape[1:], dtype=torch.float64)[None]
    std = model.denormalize_latents(one) - model.denormalize_latents(torch.zeros_like(one))
    return torch.cat([mean, posterior.logvar - 2.0 * std.log().to(posterior.logvar)], 1)
