"""The GAN step as latent-diffusion's training code runs it, and whether ours has its gradients.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.benchmark.twin import twin_of
from kl_vae.data import Batch
from kl_vae.losses.adversarial import LPIPSWithDiscriminator
from kl_vae.model import AutoEncoderKL
from kl_vae.optim.config import build_optimizer
from kl_vae.runtime.device import autocast
from kl_vae.training.step import TrainingStep, to_device


class TwinWithLoss(nn.Module):
    """The modules of diffusers with the weights and the loss of ours, for a PublishedStep."""

    def __init__(self, model: AutoEncoderKL) -> None:
        super().__init__()
        self.twin: Any = twin_of(model).train()
        self.adversary: LPIPSWithDiscriminator | None = copy.deepcopy(model.adversary)

    def forward(self, images: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Any]:
        """Images [B, C, H, W] -> their reconstruction and their posterior, as diffusers' class."""
        posterior = self.twin.encode(images).latent_dist
        noise = torch.randn_like(posterior.mean) if noise is None else noise.to(posterior.mean)
        return self.twin.decode(posterior.mean + posterior.std * noise).sample, posterior

    def own_parameters(self) -> list[nn.Parameter]:
        """Those of the autoencoder."""
        return list(self.twin.parameters())

    def get_last_layer(self) -> Tensor:
        """The weight of the last convolution, [C, ch, 3, 3]."""
        weight: Tensor = self.twin.decoder.conv_out.weight
        return weight


@dataclass
class PublishedStep:
    """The operations of a step of Rombach et al. (2022) under Lightning, in their order.

    Two phases, one an optimiser, each with a forward of the autoencoder and of LPIPS: their loss
    begins with both, whichever optimiser's turn it is. In each phase the parameters that the other
    optimiser holds take no gradient, so that the second forward builds no graph. The
    adaptive weight is found by two backward passes to the last layer, and the backward of the total
    then goes through LPIPS and the discriminator once more. What their code copies to make tensors
    contiguous and what it logs is left out.

    The modules and optimisers are ours. Of the loss it takes the weights, LPIPS and the
    discriminator; the formula is the published one: L1, sums over an image's values, hinge,
    adaptive weighting.

    Attributes:
        model: whose loss is a LPIPSWithDiscriminator with LPIPS; ours, or diffusers'.
        optimizer: over the autoencoder.
        discriminator_optimizer: over the discriminator.
        channels_last: memory layout of the images, as of the model.
        precision: fp32 or bf16, by autocast. (fp16 would need a gradient scaler.)
    """

    model: AutoEncoderKL | TwinWithLoss
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    channels_last: bool = True
    precision: str = "fp32"

    def __post_init__(self) -> None:
        adversary = self.model.adversary
        assert adversary is not None and adversary.perceptual_loss is not None
        self.loss, self.lpips = adversary, adversary.perceptual_loss
        self._own = self.model.own_parameters()
        self._discriminators = list(adversary.discriminator.parameters())

    @classmethod
    def beside(cls, ours: TrainingStep) -> PublishedStep:
        """The same step as `ours`: on a copy of its model, with optimisers of the same kind."""
        return cls._of(copy.deepcopy(ours.state.model), ours, ours.config.training.channels_last)

    @classmethod
    def with_twin(cls, ours: TrainingStep) -> PublishedStep:
        """The same with diffusers' modules, in their layout."""
        return cls._of(TwinWithLoss(ours.state.model), ours, channels_last=False)

    @classmethod
    def _of(
        cls, model: AutoEncoderKL | TwinWithLoss, ours: TrainingStep, channels_last: bool
    ) -> PublishedStep:
        assert model.adversary is not None
        discriminator, config = model.adversary.discriminator, ours.config
        return cls(
            model,
            build_optimizer(model.own_parameters(), config.optimizer),
            build_optimizer(discriminator.parameters(), config.discriminator_optimizer),
            channels_last,
            config.training.precision,
        )

    def __call__(self, batch: Batch, noise: Tensor | None = None) -> None:
        """Take a step on images [B, C, H, W].

        `noise`: of both samples of the posterior, [B, z, h, w]; None: drawn afresh for each.
        """
        device = self._own[0].device
        images = to_device(batch.images, device, self.channels_last)

        _toggle(learning=self._own, resting=self._discriminators)
        with autocast(device, self.precision):
            total = self._autoencoder_loss(images, noise)
        _update(self.optimizer, total)

        _toggle(learning=self._discriminators, resting=self._own)
        with autocast(device, self.precision):
            total = self._discriminator_loss(images, noise)
        _update(self.discriminator_optimizer, total)

    def _autoencoder_loss(self, images: Tensor, noise: Tensor | None) -> Tensor:
        loss = self.loss
        reconstructions, nll, kl = self._likelihood(images, noise)
        g_loss: Tensor = -loss.discriminator(reconstructions).mean()
        weight = self._adaptive_weight(nll, g_loss)
        total: Tensor = nll + loss.kl_weight * kl + weight * loss.disc_factor * g_loss
        return total

    def _adaptive_weight(self, nll: Tensor, g_loss: Tensor) -> Tensor:
        last_layer = self.model.get_last_layer()
        (nll_gradient,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
        (g_gradient,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
        ratio = nll_gradient.norm() / (g_gradient.norm() + 1e-4)
        weight: Tensor = self.loss.disc_weight * ratio.clamp(0.0, 1e4).detach()
        return weight

    def _likelihood(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What their loss computes first, for either optimiser: [B, C, H, W] and two scalars."""
        loss, batch_size = self.loss, images.shape[0]
        reconstructions, posterior = self.model(images, noise=noise)
        rec_loss = loss.pixelloss_weight * (images - reconstructions).abs()  # [B, C, H, W]
        rec_loss = rec_loss + loss.perceptual_weight * self.lpips(images, reconstructions)
        nll = (rec_loss / loss.logvar.exp() + loss.logvar).sum() / batch_size
        return reconstructions, nll, posterior.kl().sum() / batch_size

    def _discriminator_loss(self, images: Tensor, noise: Tensor | None) -> Tensor:
        reconstructions, *_ = self._likelihood(images, noise)
        real = self.loss.discriminator(images.detach())
        fake = self.loss.discriminator(reconstructions.detach())
        hinge: Tensor = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        return self.loss.disc_factor * hinge


@contextmanager
def noting_gradients(optimizer: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    """Copy the gradients of all parameters that an optimiser is about to step with."""
    gradients: list[Tensor] = []

    def note(*_: object) -> None:
        for group in optimizer.param_groups:
            gradients.extend(p.grad.clone() for p in group["params"])

    handle = optimizer.register_step_pre_hook(note)
    try:
        yield gradients
    finally:
        handle.remove()


def gradient_difference(ours: list[Tensor], published: list[Tensor]) -> float:
    """The largest relative difference of a parameter's gradients, by their norms.

    A gradient that is below a thousandth of the whole counts as large as that: such ones are partly
    rounding (of a bias before a norm, for one), which need not agree.
    """
    whole = torch.stack([x.norm() for x in published]).norm()
    pairs = zip(ours, published, strict=True)
    ratios = [(a - b).norm() / torch.maximum(b.norm(), 1e-3 * whole) for a, b in pairs]
    return torch.stack(ratios).max().item()


def _toggle(learning: list[nn.Parameter], resting: list[nn.Parameter]) -> None:
    for parameters, learns in ((learning, True), (resting, False)):
        for p in parameters:
            p.requires_grad_(learns)


def _update(optimizer: torch.optim.Optimizer, total: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
