"""Metrics over the whole validation set, exact for any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kl_vae.data import BadImage, Batch
from kl_vae.metrics.similarity import psnr, ssim
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.device import autocast, copy_to_device, on_cpu
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError
from kl_vae.training.config import RunConfig
from kl_vae.training.guards import BadImages, StopRequest
from kl_vae.training.logging import Metrics, to_numbers
from kl_vae.training.step import latent_moments, posterior_noise, to_device

logger = logging.getLogger(__name__)

SCALE_TOLERANCE = 0.05  # relative change of the latents' scale that a run reports at its end


@torch.no_grad()
def validate(
    model: AutoEncoderKL,
    batches: Iterable[Batch],
    step: int,
    config: RunConfig,
    ranks: Ranks,
    bad_images: BadImages,
    average: AutoEncoderKL | None = None,
    stop: StopRequest | None = None,
) -> Metrics | None:
    """Return means over the validation set: "val/..." of the loss, psnr (dB), ssim and latents.

    Each image counts once: shares are not padded, and a rank may have none. Sums are float64.
    The noise of a posterior's sample depends only on the image's position in the set. Unusable
    images are skipped.

    Args:
        model: the bare module.
        batches: this rank's share.
        step: optimisation steps so far.
        config: of the run.
        ranks: all ranks of the run.
        bad_images: list of unusable images, updated.
        average: the model with averaged weights, whose metrics are "val_ema/...".
        stop: whether this rank was asked to stop.

    Returns:
        The metrics, or None if a rank was asked to stop before they were complete.

    Raises:
        RunError: no image can be used.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    bad: list[BadImage] = []
    share = iter(batches)
    # all ranks together: one may have a batch more than another, or none
    while True:
        batch = next(share, None)
        stop_requested = stop is not None and stop.requested
        stopping, unfinished = ranks.any_of(stop_requested, batch is not None)
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
        noise = posterior_noise(model, batch, "validation", config.training.seed)
        images = to_device(batch.images, ranks.device, config.training.channels_last)
        noise = copy_to_device(noise, ranks.device)
        with autocast(ranks.device, config.training.precision), evaluating(model):
            metrics = _metrics(model, images, step, noise, model)
            if average is not None:
                of_average = _metrics(model, images, step, noise, average)
                metrics |= {f"val_ema/{key[4:]}": value for key, value in of_average.items()}
        for key, value in zip(metrics, on_cpu(list(metrics.values())), strict=True):
            sums[key] = sums.get(key, 0.0) + value * len(images)
        count += len(images)
    bad_images.note(bad)
    # a rank without images does not know the names of the metrics
    shapes = ranks.gather({name: list(total.shape) for name, total in sums.items()})
    names = next((of_rank for of_rank in shapes if of_rank), None)
    if names is None:
        raise RunError("no validation image can be used; see bad_images.txt")
    totals = {name: sums.get(name, torch.zeros(shape).double()) for name, shape in names.items()}
    number = ranks.sum(torch.tensor(count))
    return to_numbers({name: ranks.sum(total) / number for name, total in totals.items()})


def warn_about_scale(model: AutoEncoderKL, metrics: Metrics) -> None:
    """Warn if training moved the scale of the latents away from the normalisation of the model.

    Args:
        model: the trained model.
        metrics: of the last validation or, without any, of the last steps.
    """
    trains = any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if name.startswith(("encoder.", "quant_conv."))
    )
    split = "val" if "val/latent_std" in metrics else "train"
    if model.latents is None or not trains or f"{split}/latent_std" not in metrics:
        return
    mean, std = (
        torch.tensor(metrics[f"{split}/latent_{name}"], dtype=torch.float64)
        for name in ("mean", "std")
    )
    scale = model.latents.scale_of(mean, std)
    if abs(scale - 1.0) > SCALE_TOLERANCE:
        stated = (
            "std" if model.latents.per_channel else f"scale_factor={model.latents.scale_factor}"
        )
        logger.warning(
            "latents normalized by %s have a standard deviation of %.3g instead of 1: the trained "
            "encoder has moved their scale; measure it with kl-vae encode --statistics",
            stated,
            scale,
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, and back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _metrics(
    model: AutoEncoderKL, images: Tensor, step: int, noise: Tensor, autoencoder: nn.Module
) -> dict[str, Tensor]:
    """Return means over a batch, with the loss of `model`."""
    out = model.step(images, step, "val", noise=noise, forward=autoencoder)
    return {
        **out.log,
        **latent_moments(out.posterior, "val"),
        "val/psnr": psnr(images, out.reconstruction).mean(),
        "val/ssim": ssim(images, out.reconstruction).mean(),
    }
