"""Posterior of the autoencoder: a Gaussian with diagonal covariance.

Shapes: B batch, z latent channels, h and w latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """Gaussians N(mean, diag(var)) over latents [z, h, w], one for each of B images.

    Args:
        parameters: moments [B, 2z, h, w]: mean, then log variance, which is clamped to [-30, 20].
            Half precision is converted to float32.
        deterministic: use a point mass at the mean; std, var, `kl` and `nll` are 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.dtype in (torch.float16, torch.bfloat16):
            parameters = parameters.float()
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def __repr__(self) -> str:
        """Return shape, device and dtype, and on the CPU a summary of the values."""
        mean = self.mean
        text = f"shape={list(mean.shape)}, device={str(mean.device)!r}, dtype={mean.dtype}"
        if mean.device.type == "cpu" and type(mean) is Tensor and mean.numel():
            low, high = (x.item() for x in mean.detach().aminmax())
            text += f", mean in [{low:.3g}, {high:.3g}]"
            text += f", std {self.std.detach().mean().item():.3g} on average"
        return f"{type(self).__name__}({text})"

    @property
    def std(self) -> Tensor:
        """Standard deviation [B, z, h, w]."""
        return torch.zeros_like(self.mean) if self.deterministic else (0.5 * self.logvar).exp()

    @property
    def var(self) -> Tensor:
        """Variance [B, z, h, w]."""
        return torch.zeros_like(self.mean) if self.deterministic else self.logvar.exp()

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Draw one sample per image, [B, z, h, w], by reparametrisation: mean + std * noise.

        Args:
            generator: random generator, or a list with one per image, so that a sample does not
                depend on the other images of its batch; None: PyTorch's global generator.
            noise: standard normal noise [B, z, h, w], instead of a generator.

        Raises:
            ValueError: the number of generators is not B.
        """
        if noise is None:
            noise = self._noise(generator)
        return self.mean + self.std * noise.to(self.mean)

    def _noise(self, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        """Draw standard normal noise [B, z, h, w] on the device of the generator."""
        if generator is None or isinstance(generator, torch.Generator):
            device = self.mean.device if generator is None else generator.device
            return torch.randn(
                self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype
            )
        images = torch.split(self.mean, 1)
        if len(generator) != len(images):
            raise ValueError(
                f"generator: {len(generator)} generators for a batch of {len(images)} images; give "
                "one generator, or one per image"
            )
        noise = [
            torch.randn(image.shape, generator=each, device=each.device, dtype=image.dtype)
            for image, each in zip(images, generator, strict=True)
        ]
        return torch.cat([x.to(self.mean.device) for x in noise])

    def mode(self) -> Tensor:
        """Return the mode of the posterior, which is the mean, [B, z, h, w]."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Compute KL(q || N(0, I)) or, if given, KL(q || other) of each image, [B], in nats.

        See Kingma & Welling (2013), appendix B.
        """
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            terms = (
                ((self.mean - other.mean).square() + self.var) / other.logvar.exp()
                - 1.0
                - self.logvar
                + other.logvar
            )
        return 0.5 * terms.flatten(1).sum(dim=1)

    def nll(self, sample: Tensor) -> Tensor:
        """Compute -log q(sample) of each image, [B], in nats, for a sample [B, z, h, w]."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.flatten(1).sum(dim=1)
