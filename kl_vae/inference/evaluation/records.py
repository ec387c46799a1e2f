"""What is recorded of a unit of images: plain values, from which all results follow.

A record has `images`, [index, height, width] of each; `skipped`, [index, reason]; and for each of
`models` its `figures`, lists of one value an image (None: it has none), and as `RunningMoments` its
`latents`, of samples of the posteriors, and their `means`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.metrics.moments import RunningMoments, latent_moments

Record = dict[str, Any]

FIGURES = ("psnr", "ssim", "ms_ssim", "lpips", "kl_nats", "kl_bits_per_pixel")  # one an image


class ModelRecord:
    """One model's part of a record, made from batches."""

    def __init__(self, latent_channels: int) -> None:
        self._figures: dict[str, list[float | None]] = {}
        self._latents = self._means = RunningMoments.empty(latent_channels)

    def add(self, posterior: DiagonalGaussianDistribution, figures: Mapping[str, Tensor]) -> None:
        """Add a batch: B posteriors, and [B] of each figure; of PSNR `mse`, which is finite."""
        for key, values in {**figures, "kl": posterior.kl()}.items():
            finite = [value if math.isfinite(value) else None for value in values.tolist()]
            self._figures.setdefault(key, []).extend(finite)
        self._latents = self._latents.merge(latent_moments(posterior))
        # what varies without the noise
        points = DiagonalGaussianDistribution(posterior.parameters, deterministic=True)
        self._means = self._means.merge(latent_moments(points))

    def values(self) -> Record:
        """As JSON takes it."""
        latents, means = self._latents.values(), self._means.values()
        return {"figures": self._figures, "latents": latents, "means": means}


def image_figures(record: Record, model: int) -> Iterator[dict[str, float | None]]:
    """Those of `FIGURES` that were asked for, of each image; None: it has none.

    psnr is inf where the reconstruction is exact.
    """
    figures = record["models"][model]["figures"]
    for i, (_, height, width) in enumerate(record["images"]):
        found = {key: values[i] for key, values in figures.items()}
        nats = found["kl_nats"] = found.pop("kl")
        found["kl_bits_per_pixel"] = None if nats is None else nats / math.log(2) / height / width
        if "mse" in found:
            found["psnr"] = psnr_of(found["mse"])
        yield {key: found[key] for key in FIGURES if key in found}


def psnr_of(mse: float) -> float:
    """In dB, of an MSE of images from 0 to 1; inf of 0."""
    return -10.0 * math.log10(mse) if mse else math.inf
