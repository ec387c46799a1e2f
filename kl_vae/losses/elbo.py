"""Negative evidence lower bound: reconstruction error and KL.

Shapes: B batch, N = C * H * W values per image.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.runtime.schema import from_arguments


@dataclass(frozen=True)
class ELBOConfig:
    """Arguments of `ELBO`.

    Attributes:
        reconstruction: `mse` or `l1`.
        kl_weight: weight of the KL (nats per image) relative to the summed reconstruction error.
        kl_warmup_steps: optimisation steps over which the KL weight increases linearly from 0.
        learn_logvar: train the scalar s = logvar with the autoencoder.
        logvar_init: initial value of s.
        reduction: `mean` or `sum` over the values of an image.
    """

    reconstruction: Literal["mse", "l1"] = "mse"
    kl_weight: float = 1e-6
    kl_warmup_steps: int = 0
    learn_logvar: bool = False
    logvar_init: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        for key in ("kl_weight", "kl_warmup_steps"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be 0 or more")


class ELBO(nn.Module):
    """Negative log-likelihood of the image plus kl_weight * KL (Kingma & Welling 2013, eq. 10).

    With e the mean over an image's values of |x - x_rec| (`l1`: Laplace likelihood) or
    (x - x_rec)^2 (`mse`: Gaussian likelihood), and s = logvar, as in the published first stages:

        nll   = N * (e / exp(s) + s)
        total = mean over images of (nll + kl_weight * KL) / N

    Published configs use the sum, without dividing by N; `reduction="sum"` selects it. The division
    does not change the optimum, so `kl_weight` has the published meaning. It makes the gradient
    norm independent of the resolution, so that one clipping threshold suits all resolutions.

    See `ELBOConfig` for the arguments.

    Raises:
        ValueError: an argument is invalid.
    """

    __signature__ = inspect.signature(ELBOConfig)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        config = from_arguments(ELBOConfig, *args, **kwargs)
        self.reconstruction = config.reconstruction
        self.kl_weight = config.kl_weight
        self.kl_warmup_steps = config.kl_warmup_steps
        self.reduction = config.reduction
        self.logvar = nn.Parameter(
            torch.tensor(config.logvar_init), requires_grad=config.learn_logvar
        )

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posterior: DiagonalGaussianDistribution,
        global_step: int,
        last_layer: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimise, and its detached terms with keys `{split}/...`."""
        difference = inputs.float() - reconstructions.float()
        error = difference.abs() if self.reconstruction == "l1" else difference.square()
        values = inputs[0].numel()
        rec_loss = error.mean()
        nll_loss = rec_loss / self.logvar.exp() + self.logvar
        kl_loss = posterior.kl().mean()
        kl_weight = self.kl_weight_at(global_step)
        total = nll_loss + (kl_weight / values) * kl_loss
        if self.reduction == "sum":
            total, nll_loss = values * total, values * nll_loss
        log = {
            "total_loss": total,
            "nll_loss": nll_loss,
            "rec_loss": rec_loss,
            "kl_loss": kl_loss,
            "kl_weight": torch.tensor(kl_weight, dtype=torch.float64),
            "logvar": self.logvar,
        }
        return total, {f"{split}/{key}": value.detach().clone() for key, value in log.items()}

    def kl_weight_at(self, global_step: int) -> float:
        """Return the KL weight after `global_step` optimisation steps."""
        if global_step >= self.kl_warmup_steps:
            return self.kl_weight
        return self.kl_weight * global_step / self.kl_warmup_steps


def default_loss(
    inputs: Tensor,
    reconstructions: Tensor,
    posterior: DiagonalGaussianDistribution,
    global_step: int,
    last_layer: Tensor | None = None,
    split: str = "train",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return MSE (mean over all values) + 0.5 * KL (sum over latents, mean over images).

    This is the loss for `lossconfig=None`. With this weight the KL dominates and the posterior
    collapses to N(0, I); set a lossconfig to train a useful model.
    """
    rec_loss = (inputs.float() - reconstructions.float()).square().mean()
    kl_loss = posterior.kl().mean()
    total = rec_loss + 0.5 * kl_loss
    log = {"total_loss": total, "rec_loss": rec_loss, "kl_loss": kl_loss}
    return total, {f"{split}/{key}": value.detach() for key, value in log.items()}
