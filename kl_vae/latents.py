"""Normalisation of latents for the training of diffusion models.

Shapes: B batch, z latent channels, h and w latent height and width, p side of a patch of latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_vae.runtime.device import copy_to_device


@dataclass(frozen=True, kw_only=True)
class LatentNormalization:
    """Affine normalisation to zero mean and unit variance (Rombach et al. 2022, appendix G).

    normalised = (z - shift_factor) * scale_factor, or with `per_channel` (z - mean) / std.

    Attributes:
        scale_factor: 1 / std of all values (Stable Diffusion: 0.18215).
        shift_factor: mean of all values (Stable Diffusion: 0, FLUX.1: 0.1159).
        mean: mean per channel, z values; with `patch_size` p, mean per channel and position in a
            patch of p x p latents, z * p * p values with the column as the fastest index (FLUX.2:
            p = 2).
        std: standard deviation, in the same layout as `mean`.
        patch_size: p.
        per_channel: normalise by `mean` and `std`.

    Raises:
        ValueError: a value is invalid; the message has one line per error.
    """

    scale_factor: float = 1.0
    shift_factor: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    patch_size: int = 1
    per_channel: bool = False

    def __post_init__(self) -> None:
        errors = []
        if not (math.isfinite(self.scale_factor) and self.scale_factor > 0):
            errors.append(f"scale_factor={self.scale_factor}: must be a finite number above 0")
        if not math.isfinite(self.shift_factor):
            errors.append(f"shift_factor={self.shift_factor}: must be a finite number")
        if self.patch_size < 1:
            errors.append(f"patch_size={self.patch_size}: must be at least 1")
        if (self.mean is None) != (self.std is None):
            given, missing = ("mean", "std") if self.std is None else ("std", "mean")
            errors.append(f"{missing}=null: {given} is given; give both, or neither")
        elif self.per_channel and self.mean is None:
            errors.append("per_channel=True: needs mean and std; give both, or set it to false")
        elif self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                errors.append(
                    f"std has {len(self.std)} values, mean has {len(self.mean)}; give equal numbers"
                )
            if not all(map(math.isfinite, self.mean)):
                errors.append("mean: must be finite numbers")
            if not all(math.isfinite(x) and x > 0 for x in self.std):
                errors.append("std: must be finite numbers above 0")
        if errors:
            raise ValueError("\n".join(errors))

    def check_channels(self, channels: int) -> None:
        """Raise ValueError unless mean and std have the right length for z = `channels`."""
        expected = channels * self.patch_size**2
        if self.mean is not None and len(self.mean) != expected:
            patches = f" times {self.patch_size} x {self.patch_size} positions"
            raise ValueError(
                f"mean has {len(self.mean)} values: the latents have {channels} channels"
                f"{patches if self.patch_size > 1 else ''}; give {expected} values"
            )

    def normalize(self, z: Tensor) -> Tensor:
        """Normalise raw latents [B, z, h, w]."""
        shift, std = self._shift_and_std(z)
        return (z - shift) / std

    def denormalize(self, z: Tensor) -> Tensor:
        """Convert normalised latents [B, z, h, w] back to raw latents for `decode`."""
        shift, std = self._shift_and_std(z)
        return z * std + shift

    def scale_of(self, mean: Tensor, std: Tensor) -> float:
        """Return the standard deviation of normalised latents: 1 if they have the stated scale.

        Args:
            mean: mean of raw latents per channel, [z].
            std: standard deviation of raw latents per channel, [z].
        """
        if not self.per_channel:  # law of total variance over the channels
            variance = std.square().mean() + mean.var(correction=0)
            return self.scale_factor * math.sqrt(variance.item())
        means, stds = (
            torch.tensor(x, dtype=std.dtype).view(len(std), -1) for x in (self.mean, self.std)
        )  # [z, p * p]
        stated = stds.square().mean(1) + means.var(1, correction=0)  # over the positions
        return math.sqrt((std.square() / stated).mean().item())

    def _shift_and_std(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and std: scalars, or [z, 1, 1], or [z, h, w] with patches."""
        if not self.per_channel:
            return z.new_full((), self.shift_factor), z.new_full((), 1.0 / self.scale_factor)
        p, (height, width) = self.patch_size, z.shape[2:]

        def tile(values: tuple[float, ...] | None) -> Tensor:
            patch = copy_to_device(torch.tensor(values, dtype=z.dtype), z.device).view(-1, p, p)
            if p == 1:
                return patch
            return patch.repeat(1, -(-height // p), -(-width // p))[:, :height, :width]

        return tile(self.mean), tile(self.std)
