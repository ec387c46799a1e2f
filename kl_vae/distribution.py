"""The posterior: a Gaussian with a diagonal covariance.

B batch, z latent channels, h and w the latents' height and width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """N(mean, diag(var)) over latents [z, h, w], one per image of a batch of B.

    Args:
        parameters: moments [B, 2z, h, w]: mean, then log variance, which is clamped to [-30, 20].
            Half precision is raised to float32: all arithmetic here is at least float32.
        deterministic: a point at the mean: std and var are 0, and so are `kl` and `nll`.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.dtype in (torch.float16, torch.bfloat16):
            parameters = parameters.float()
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def __repr__(self) -> str:
        """Shape, device and dtype, and the values' summary where they are at hand (on the CPU)."""
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
        self, generator: torch.Generator | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Draw one sample per image, [B, z, h, w], by reparametrisation: mean + std * noise.

        Args:
            generator: where the noise comes from; None: torch's global generator.
            noise: standard normal noise [B, z, h, w] drawn beforehand, in place of a generator.
        """
        if noise is None:
            device = generator.device if generator is not None else self.mean.device
            noise = torch.randn(
                self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype
            )
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """Return the most likely latents, [B, z, h, w]: the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Return KL(q || N(0, I)), one value per image, [B], in nats.

        Kingma & Welling (2013, appendix B). With `other`, KL(q || other) instead.
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
        """Return -log q(sample), one value per image, [B], in nats; sample: [B, z, h, w]."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.flatten(1).sum(dim=1)
