"""The figures of the whole validation set, exact for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kl_vae.data import Batch
from kl_vae.device import autocast
from kl_vae.inference.metrics import psnr, ssim
from kl_vae.model import AutoEncoderKL
from kl_vae.training.config import RunConfig
from kl_vae.training.distributed import Ranks
from kl_vae.training.step import first_error, latent_noise, to_device


@torch.no_grad()
def validate(
    model: AutoEncoderKL, batches: Iterable[Batch], step: int, config: RunConfig, ranks: Ranks
) -> dict[str, float]:
    """Mean figures over the validation set, "val/..." of the loss, psnr (dB) and ssim.

    Each image counts once: no rank pads its share, and a rank may have none. Sums are float64.
    The posterior is sampled with noise that depends on the image's place in the set alone.

    Args:
        model: the bare module.
        batches: this rank's share.
        step: optimisation steps so far.
        config: of the run.
        ranks: over which the sums go.

    Raises:
        ValueError: an image that cannot be used.
    """
    model.eval()
    sums: dict[str, float] = {}  # Python's floats have 64 bits
    count = 0
    for batch in batches:
        if any(batch.errors):
            raise ValueError(f"{first_error(batch)}; mend it, or leave it out of validation")
        noise = latent_noise(model, batch, "validation", config.training.seed)
        images = to_device(batch.images, ranks.device, config.training.channels_last)
        with autocast(ranks.device, config.training.precision):
            out = model.step(images, step, "val", noise=noise.to(ranks.device))
        figures = {
            **out.log,
            "val/psnr": psnr(images, out.reconstruction),
            "val/ssim": ssim(images, out.reconstruction),
        }
        for key, value in figures.items():
            # a scalar is the mean over the batch
            sums[key] = sums.get(key, 0.0) + value.cpu().double().mean().item() * len(images)
        count += len(images)
    model.train()
    # a rank without images does not know the names of the figures: rank 0 always has some
    names = ranks.on_first(lambda: sorted(sums))
    totals = torch.tensor([*(sums.get(name, 0.0) for name in names), count], dtype=torch.float64)
    *means, count = ranks.sum(totals).tolist()
    return {name: total / count for name, total in zip(names, means, strict=True)}
