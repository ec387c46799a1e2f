"""What the records of an evaluation come to: means with standard errors, latents, rFID.

n images; what each figure means is in `DEFINITIONS`, which results.json carries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kl_vae.inference.evaluation.records import (
    FIGURES,
    Record,
    image_figures,
    psnr_of,
)
from kl_vae.latents import LatentNormalization
from kl_vae.metrics.fid import FeatureStatistics, frechet_distance
from kl_vae.metrics.moments import RunningMoments, latent_normalization
from kl_vae.metrics.similarity import MS_SSIM_SIDE, WINDOW

logger = logging.getLogger(__name__)

ACTIVE_VARIANCE = 0.01
_FEW_IMAGES = 10_000  # of 2048 features; published figures are of 5,000 to 50,000

DEFINITIONS = {
    "compared": "the reconstruction as a picture file would hold it, rounded to 8 bits and clamped "
    "to [0, 255], with the image after resize and crop in 8 bits; images of other than 1, 3 or 4 "
    "channels as float32 in [0, 1]. A whole image whose side is no multiple of f is continued to "
    "one by repeating its edge, which is cut off again",
    "mean": "over the images that have the figure (`number`; the others are `left_out`); "
    "`standard_error` is that of this mean, the images' standard deviation (n - 1) over sqrt(n)",
    "psnr": "10 log10(255^2 / MSE) of each image in dB, the MSE over all pixels and channels; an "
    "exact reconstruction has none",
    "psnr_of_mean_mse": "10 log10(255^2 / MSE) in dB of the mean of the images' MSE: by Jensen's "
    "inequality never above the mean of psnr",
    "ssim": "Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5, K1 0.01, K2 0.03, population "
    "variances, range 255, windows inside the image, mean over windows and channels (RGB as it "
    f"is); none below {WINDOW} pixels a side. As scikit-image's with gaussian_weights=True, "
    "use_sample_covariance=False",
    "ms_ssim": "Wang et al. 2003: SSIM's window and constants, five scales of 2 x 2 means, weights "
    "0.0448, 0.2856, 0.3001, 0.2363, 0.1333, range 255, negative terms count as 0; none below "
    f"{MS_SSIM_SIDE} pixels a side. As torchmetrics' MultiScaleStructuralSimilarityIndexMeasure "
    "with its defaults",
    "lpips": "Zhang et al. 2018, version 0.1 with linear heads, at the pictures' own size; one "
    "channel three times, of four the first three; none where the network cannot see so small "
    "an image",
    "rfid": "Heusel et al. 2017, between the images and their reconstructions: 2048 features of "
    "torch-fidelity's InceptionV3 (TensorFlow's weights of 2015, its resize to 299 x 299 without "
    "antialiasing) in fp32, means and covariances (n - 1) in float64. It is biased upwards by few "
    "images: compare it with that of the same number alone",
    "kl_nats": "KL(posterior || N(0, I)) of an image's latents, summed, in nats",
    "kl_bits_per_pixel": "kl_nats / (ln 2 * H * W), H x W the image's pixels",
    "latents": "of samples of the posteriors, over all images and positions: mean and std of each "
    "channel; over the channels as well, shift_factor is the mean and scale_factor is 1 / std",
    "active_channels": "Burda et al. 2016: latent channels whose posterior mean has a variance "
    f"above {ACTIVE_VARIANCE} over all images and positions",
}


@dataclass(frozen=True)
class Mean:
    """The mean of what images have, and how well it is known."""

    mean: float | None  # None: no image has it
    standard_error: float | None  # None: fewer than two have
    number: int
    left_out: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Mean:
        """The mean of the values that are there and finite."""
        kept = [value for value in values if value is not None and math.isfinite(value)]
        number, left_out = len(kept), len(values) - len(kept)
        if not kept:
            return cls(None, None, 0, left_out)
        mean = math.fsum(kept) / number
        if number == 1:
            return cls(mean, None, 1, left_out)
        variance = math.fsum((value - mean) ** 2 for value in kept) / (number - 1)
        return cls(mean, math.sqrt(variance / number), number, left_out)


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        name: of the model.
        figures: those of `FIGURES` that were asked for.
        psnr_of_mean_mse: in dB; None: not asked for, or every reconstruction is exact.
        rfid: None: not asked for.
        latents: statistics of samples of the posteriors.
        variances: of the posteriors' means, over images and positions, of each channel.
    """

    name: str
    figures: Mapping[str, Mean]
    psnr_of_mean_mse: float | None
    rfid: float | None
    latents: LatentNormalization
    variances: list[float]

    @property
    def active_channels(self) -> int:
        """How many channels carry information (Burda et al. 2016, section 5.2)."""
        return sum(variance > ACTIVE_VARIANCE for variance in self.variances)


def evaluate_records(
    records: Callable[[], Iterable[Record]],
    features: Callable[[int], Iterable[Tensor]] | None,
    names: Sequence[str],
) -> list[Evaluation]:
    """Sum up the records of all units, in their order.

    Args:
        records: gives those that `Evaluator.unit` made; called once a model.
        features: gives those [n_i, d] of the images (0) and of each model's reconstructions (from
            1 on), unit by unit; None: rfid is not asked for.
        names: of the models.

    Raises:
        ValueError: rfid of fewer than two images.
    """
    evaluations = [_evaluation(records(), model, name) for model, name in enumerate(names)]
    if features is None:
        return evaluations
    of_images = FeatureStatistics.of(lambda: features(0))
    if of_images.number < _FEW_IMAGES:
        logger.warning(
            "rfid of %d images is biased upwards: compare it with that of the same number alone",
            of_images.number,
        )
    distances = []
    for model in range(len(names)):
        of_model = FeatureStatistics.of(lambda i=model + 1: features(i))  # type: ignore[misc]
        distances.append(frechet_distance(of_images, of_model))
    return [replace(x, rfid=d) for x, d in zip(evaluations, distances, strict=True)]


def _evaluation(records: Iterable[Record], model: int, name: str) -> Evaluation:
    columns: dict[str, list[float | None]] = {}
    errors: list[float] = []
    latents = means = None
    for record in records:
        of_model = record["models"][model]
        for figures in image_figures(record, model):
            for key, value in figures.items():
                columns.setdefault(key, []).append(value)
        errors += of_model["figures"].get("mse", [])
        ours, our_means = (
            RunningMoments.from_values(of_model[key]) for key in ("latents", "means")
        )
        latents = ours if latents is None else latents.merge(ours)
        means = our_means if means is None else means.merge(our_means)
    assert latents is not None and means is not None  # there is an image
    mean_error = math.fsum(errors) / len(errors) if errors else 0.0
    return Evaluation(
        name,
        {key: Mean.of(columns[key]) for key in FIGURES if key in columns},
        psnr_of(mean_error) if mean_error else None,
        None,
        latent_normalization(latents),
        means.variance().tolist(),
    )
