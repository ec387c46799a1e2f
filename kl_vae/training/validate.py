"""The figures of the whole validation set, exact for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kl_vae.data import BadImage, Batch
from kl_vae.metrics.similarity import psnr, ssim
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.device import autocast
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError
from kl_vae.training.config import RunConfig
from kl_vae.training.figures import Figures, as_figures, evaluating, latent_moments
from kl_vae.training.guards import BadImages
from kl_vae.training.step import latent_noise, noise_to_device, to_device


@torch.no_grad()
def validate(
    model: AutoEncoderKL,
    batches: Iterable[Batch],
    step: int,
    config: RunConfig,
    ranks: Ranks,
    bad_images: BadImages,
    average: AutoEncoderKL | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Figures | None:
    """Mean figures over the validation set: "val/..." of the loss, psnr (dB), ssim and latents.

    Each image counts once: no rank pads its share, and a rank may have none. Sums are float64.
    The posterior is sampled with noise that depends on the image's place in the set alone. Images
    that cannot be used are left out.

    Args:
        model: the bare module.
        batches: this rank's share.
        step: optimisation steps so far.
        config: of the run.
        ranks: over which the sums go.
        bad_images: those met so far.
        average: the model with averaged weights, whose figures are "val_ema/...".
        stop: whether this rank has been asked to end.

    Returns:
        The figures, or None where a rank was asked to end before they were complete.

    Raises:
        RunError: no image can be used.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    bad: list[BadImage] = []
    share = iter(batches)
    # all ranks together: one has a batch more than another, or none
    while True:
        batch = next(share, None)
        stopping, unfinished = ranks.any_of(stop(), batch is not None)
        if stopping:
            return None
        if not unfinished:
            break
        if batch is None:
            continue
        bad += batch.bad
        batch = batch.usable()
        if not batch.names:
            continue
        noise = latent_noise(model, batch, "validation", config.training.seed)
        images = to_device(batch.images, ranks.device, config.training.channels_last)
        noise = noise_to_device(noise, ranks.device)
        with autocast(ranks.device, config.training.precision), evaluating(model):
            figures = _figures(model, images, step, noise, model)
            if average is not None:
                of_average = _figures(model, images, step, noise, average)
                figures |= {f"val_ema/{key[4:]}": value for key, value in of_average.items()}
        for key, value in figures.items():
            sums[key] = sums.get(key, 0.0) + value.cpu().double() * len(images)
        count += len(images)
    bad_images.note(bad)
    # a rank without images does not know the figures
    shapes = ranks.gather({name: list(total.shape) for name, total in sums.items()})
    names = next((of_rank for of_rank in shapes if of_rank), None)
    if names is None:
        raise RunError("no validation image can be used; look at bad_images.txt")
    totals = {name: sums.get(name, torch.zeros(shape).double()) for name, shape in names.items()}
    number = ranks.sum(torch.tensor(count))
    return as_figures({name: ranks.sum(total) / number for name, total in totals.items()})


def _figures(
    model: AutoEncoderKL, images: Tensor, step: int, noise: Tensor, autoencoder: nn.Module
) -> dict[str, Tensor]:
    """Means over a batch, with the loss of `model`."""
    out = model.step(images, step, "val", noise=noise, forward=autoencoder)
    return {
        **out.log,
        **latent_moments(out.posterior, "val"),
        "val/psnr": psnr(images, out.reconstruction).mean(),
        "val/ssim": ssim(images, out.reconstruction).mean(),
    }
