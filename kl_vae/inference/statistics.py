"""The mean and standard deviation of a data set's latents.

B batch, z latent channels, h and w the latents' height and width.

The latents are samples of the posteriors, z = mean + std * noise. By the law of total variance

    Var(z) = Var(mean) + E[std^2],    E[z] = E[mean],

over all images and positions of a channel: the moments say it exactly, and nothing is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kl_vae.data import Batch
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.coding import encode_images
from kl_vae.inference.tiling import Tiling
from kl_vae.latents import LatentNormalization
from kl_vae.model import AutoEncoderKL


@dataclass(frozen=True)
class LatentSums:
    """What is known of the latents of some images; of any parts of a data set, it can be merged.

    Attributes:
        images: how many.
        values: of each channel, h * w an image.
        mean: of each channel.
        squares: of each channel, the sum of squared deviations of its values from `mean`.
    """

    images: int
    values: int
    mean: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def of_nothing(cls, channels: int) -> LatentSums:
        """Where sums begin."""
        return cls(0, 0, (0.0,) * channels, (0.0,) * channels)

    @classmethod
    def of(cls, posterior: DiagonalGaussianDistribution) -> LatentSums:
        """The sums of samples of B posteriors, in float64, since those of a data set are long."""
        means = posterior.mean.cpu().double().transpose(0, 1).flatten(1)  # [z, B * h * w]
        variances = posterior.var.cpu().double().transpose(0, 1).flatten(1)
        mean = means.mean(1)
        squares = (means - mean[:, None]).square().sum(1) + variances.sum(1)
        return cls(
            len(posterior.mean), means.shape[1], tuple(mean.tolist()), tuple(squares.tolist())
        )

    def merge(self, other: LatentSums) -> LatentSums:
        """The sums of both (Chan, Golub & LeVeque 1979, equation 2.1): nothing large cancels."""
        values = self.values + other.values
        share = other.values / max(values, 1)
        differences = [theirs - ours for ours, theirs in zip(self.mean, other.mean, strict=True)]
        return LatentSums(
            self.images + other.images,
            values,
            tuple(m + d * share for m, d in zip(self.mean, differences, strict=True)),
            tuple(
                ours + theirs + d * d * self.values * share
                for ours, theirs, d in zip(self.squares, other.squares, differences, strict=True)
            ),
        )

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel."""
        return tuple(math.sqrt(total / max(self.values, 1)) for total in self.squares)

    def normalization(self, per_channel: bool = False) -> LatentNormalization:
        """How these latents become those of about zero mean and unit variance.

        Args:
            per_channel: each channel by its own mean and std, else all by those of all values.
        """
        # again by the law of total variance, over the channels
        shift = math.fsum(self.mean) / len(self.mean)
        within = math.fsum(self.squares) / max(self.values, 1)
        between = math.fsum((mean - shift) ** 2 for mean in self.mean)
        return LatentNormalization(
            scale_factor=1.0 / math.sqrt((within + between) / len(self.mean)),
            shift_factor=shift,
            mean=self.mean,
            std=self.std,
            per_channel=per_channel,
        )


@torch.inference_mode()
def latent_sums(model: AutoEncoderKL, batch: Batch, precision: str = "fp32") -> LatentSums:
    """Encode a batch and sum up its latents.

    Args:
        model: in eval mode.
        batch: each of its samples is an image.
        precision: fp32, bf16 or fp16, of the encoder; the sums are float64.

    Raises:
        ValueError: moments are not finite, or the memory of the GPU does not suffice.
    """
    whole = Tiling("whole")  # the last bits of the others depend on the memory that is free
    return LatentSums.of(encode_images(model, batch.images, precision, whole, batch.names))
