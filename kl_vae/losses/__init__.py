"""Losses by name, and how a `lossconfig` selects one.

A loss is a callable

    loss(inputs, reconstructions, posterior, global_step, last_layer, split) -> (total, log)

with images [B, C, H, W] in [-1, 1], a DiagonalGaussianDistribution, the number of optimisation
steps taken so far, the weight of the decoder's last convolution, and "train" or "val". `total` is
the scalar to minimise; `log` holds detached scalars under keys such as "train/rec_loss", to which
"train/total_loss" is added where it is missing. If the loss is an nn.Module with
parameters, these are trained with the autoencoder, but for a discriminator's
(`LPIPSWithDiscriminator`), which has an optimiser of its own.
"""

from __future__ import annotations

from kl_vae.losses.adversarial import LPIPSWithDiscriminator
from kl_vae.losses.build import LOSSES, Loss, build_loss, register_loss
from kl_vae.losses.elbo import ELBO, default_loss

__all__ = [
    "ELBO",
    "LOSSES",
    "LPIPSWithDiscriminator",
    "Loss",
    "build_loss",
    "default_loss",
    "register_loss",
]
