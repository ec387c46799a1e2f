"""Loss of the published first stages: pixel error, LPIPS, a PatchGAN discriminator and KL.

The graph is cut at the reconstruction x_hat, so that each network runs once per step:

1. `forward` computes the nll (pixel error, LPIPS) at x_hat, and its gradient g_nll there.
2. From `disc_start` on, it computes the adversarial term at x_hat with frozen D, and its gradient
   g_adv. The adaptive weight compares the gradients that g_nll and g_adv induce at the decoder's
   last layer.
3. `KnownGradient` passes g_nll + weight * disc_factor * g_adv to the graph of the reconstruction,
   so that a single backward call of the caller reaches the autoencoder.
4. `discriminator_loss` computes the loss of D on the detached reconstruction.

Shapes: B batch, C channels, H and W image height and width, N = C * H * W values per image.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.losses.discriminator import (
    DiscLoss,
    DiscNorm,
    PatchDiscriminator,
    RealAndFake,
    discriminator_loss,
    generator_loss,
    lecam,
)
from kl_vae.losses.lpips import LPIPS
from kl_vae.runtime.device import copy_to_device
from kl_vae.runtime.schema import from_arguments

MAX_RATIO = 1e4


@dataclass(frozen=True)
class RegularizationWeights:
    """Alternative published form of `kl_weight`."""

    kl_loss: float


@dataclass(frozen=True)
class AdversarialConfig:
    """Arguments of `LPIPSWithDiscriminator`, in the published order.

    Attributes:
        disc_start: optimisation steps before the discriminator is first used.
        logvar_init: initial value of s = logvar.
        kl_weight: weight of the KL (nats per image) relative to the summed error.
        pixelloss_weight: weight of the pixel error.
        disc_num_layers: number of strided layers of the discriminator.
        disc_in_channels: input channels of the discriminator: those of the image, plus those of
            cond if disc_conditional.
        disc_factor: factor of both adversarial losses; 0: no discriminator.
        disc_weight: factor of the adaptive weight, or the weight itself if disc_weighting is fixed.
        perceptual_weight: weight of LPIPS; 0: LPIPS is not loaded.
        use_actnorm: equivalent to disc_norm "act".
        disc_conditional: concatenate `cond` to the input of the discriminator; only for direct
            calls of the loss.
        disc_loss: hinge, vanilla or non_saturating.
        disc_ndf: channels of the discriminator's first layer.
        disc_norm: batch (as published), act, group (independent of the batch size) or none.
        disc_weighting: adaptive weight from gradients averaged over all ranks ("global") or from
            the gradients of each rank ("rank"), or a "fixed" weight.
        disc_warmup_steps: steps for which D is trained before the adversarial term is used.
        perceptual_start: optimisation steps before LPIPS is used in training.
        lecam_weight: weight of the LeCam regularisation of D (Tseng et al. 2021); 0: none.
        lecam_decay: decay of LeCam's moving averages of the logits.
        reconstruction: `l1` (as published) or `mse`.
        reduction: `sum` over an image's values (as published), or `mean`: the total divided by N,
            which makes the gradient norm independent of the resolution.
        learn_logvar: train s with the autoencoder; false under the published names.
        perceptual: vgg, alex or squeeze; or, from Python, a module (x, x_rec) -> [B, 1, 1, 1].
        perceptual_linear: use the learned linear heads of LPIPS v0.1; False: equal weights.
        perceptual_features: weights file of the LPIPS network; None: the torchvision weights.
        perceptual_heads: weights file of the linear heads; None: downloaded once.
        regularization_weights: {kl_loss: W}, alternative published form of kl_weight.
    """

    disc_start: int
    logvar_init: float = 0.0
    kl_weight: float = 1.0
    pixelloss_weight: float = 1.0
    disc_num_layers: int = 3
    disc_in_channels: int = 3
    disc_factor: float = 1.0
    disc_weight: float = 1.0
    perceptual_weight: float = 1.0
    use_actnorm: bool = False
    disc_conditional: bool = False
    disc_loss: DiscLoss = "hinge"
    _: KW_ONLY
    disc_ndf: int = 64
    disc_norm: DiscNorm = "batch"
    disc_weighting: Literal["global", "rank", "fixed"] = "global"
    disc_warmup_steps: int = 0
    perceptual_start: int = 0
    lecam_weight: float = 0.0
    lecam_decay: float = 0.999
    reconstruction: Literal["l1", "mse"] = "l1"
    reduction: Literal["sum", "mean"] = "sum"
    learn_logvar: bool = True
    perceptual: Literal["vgg", "alex", "squeeze"] | Callable[[Tensor, Tensor], Tensor] = "vgg"
    perceptual_linear: bool = True
    perceptual_features: str | Path | None = None
    perceptual_heads: str | Path | None = None
    regularization_weights: RegularizationWeights | None = None

    def __post_init__(self) -> None:
        for key in (
            "disc_start",
            "disc_warmup_steps",
            "perceptual_start",
            "kl_weight",
            "pixelloss_weight",
            "disc_factor",
            "disc_weight",
            "perceptual_weight",
            "lecam_weight",
            "lecam_decay",
        ):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be 0 or more")
        if self.use_actnorm and self.disc_norm not in ("batch", "act"):
            raise ValueError(
                f"disc_norm={self.disc_norm}: conflicts with use_actnorm, which means act; remove "
                "one of them"
            )


class LPIPSWithDiscriminator(nn.Module):
    """Pixel error, LPIPS, adversarial term and KL (Rombach et al. 2022, app. G; Esser et al. 2021).

    With e = |x - x_rec| per value and p = LPIPS(x, x_rec) per image, s = logvar:

        nll   = mean over images of the sum over an image's values of
                (pixelloss_weight * e + perceptual_weight * p) / exp(s) + s
        total = nll + kl_weight * KL + weight * disc_factor * adversarial

    The discriminator D is trained from step `disc_start` on. The adversarial term is used from step
    `disc_start + disc_warmup_steps` on, with the adaptive weight (Esser et al. 2021, eq. 7)

        weight = disc_weight * clamp(|d nll / d w| / (|d adversarial / d w| + 1e-4), 0, 1e4)

    where w is the weight of the last layer.

    See `AdversarialConfig` for the arguments.

    Raises:
        ValueError: an argument is invalid, or pretrained weights cannot be found.
    """

    logits_average: Tensor  # [2], moving averages of real and fake logits, for LeCam

    __signature__ = inspect.signature(AdversarialConfig)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        config = from_arguments(AdversarialConfig, *args, **kwargs)
        self.disc_start = config.disc_start
        self.kl_weight = config.kl_weight
        if config.regularization_weights is not None:
            self.kl_weight = config.regularization_weights.kl_loss
        self.pixelloss_weight = config.pixelloss_weight
        self.disc_factor = config.disc_factor
        self.disc_weight = config.disc_weight
        self.perceptual_weight = config.perceptual_weight
        self.disc_conditional = config.disc_conditional
        self.disc_loss = config.disc_loss
        self.disc_weighting = config.disc_weighting
        self.disc_warmup_steps = config.disc_warmup_steps
        self.perceptual_start = config.perceptual_start
        self.lecam_weight = config.lecam_weight
        self.lecam_decay = config.lecam_decay
        self.reconstruction = config.reconstruction
        self.reduction = config.reduction
        self.logvar = nn.Parameter(
            torch.tensor(config.logvar_init), requires_grad=config.learn_logvar
        )
        self.discriminator = PatchDiscriminator(
            config.disc_in_channels,
            config.disc_num_layers,
            config.disc_ndf,
            norm="act" if config.use_actnorm else config.disc_norm,
        )
        self.perceptual_loss = _perceptual_loss(config)
        if config.lecam_weight > 0:
            self.register_buffer("logits_average", torch.zeros(2))

    def discriminates(self, global_step: int) -> bool:
        """Return whether the discriminator is trained after `global_step` optimisation steps."""
        return self.disc_factor > 0 and global_step >= self.disc_start

    def counts(self, global_step: int) -> bool:
        """Return whether the autoencoder's loss includes the adversarial term."""
        start = self.disc_start + self.disc_warmup_steps
        return self.discriminates(global_step) and self.disc_weight > 0 and global_step >= start

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posterior: DiagonalGaussianDistribution,
        global_step: int,
        last_layer: Tensor | None = None,
        split: str = "train",
        cond: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the autoencoder's loss, a scalar, and its detached terms with keys `{split}/...`.

        Without gradients, as in validation, LPIPS is always used and the discriminator never, so
        that the total is comparable over the whole run.

        Args:
            inputs: images [B, C, H, W].
            reconstructions: reconstructions of the same shape.
            posterior: posterior of the inputs.
            global_step: number of completed optimisation steps.
            last_layer: weight whose gradients the adaptive weight compares.
            split: train or val.
            cond: additional input [B, C', H, W] of the discriminator, if disc_conditional.

        Raises:
            ValueError: cond or last_layer is missing, or a network does not support the images.
        """
        training = torch.is_grad_enabled() and reconstructions.requires_grad
        x = inputs.float()
        x_hat = reconstructions.detach().float().requires_grad_(training)
        with torch.autocast(x.device.type, enabled=False):
            perceptual = not training or global_step >= self.perceptual_start
            nll, log = self._nll(x, x_hat, perceptual)
            kl_loss = posterior.kl().mean()
            kl_weight = self.kl_weight / (x[0].numel() if self.reduction == "mean" else 1)
        value = nll.detach()
        if training:
            sources = [x_hat, self.logvar] if self.logvar.requires_grad else [x_hat]
            gradient, *rest = torch.autograd.grad(nll, sources)
            log["disc_factor"] = torch.tensor(0.0)
            if self.counts(global_step):
                adversarial, adversarial_gradient = self._adversarial(x_hat, cond)
                weight = self._weight(reconstructions, last_layer, gradient, adversarial_gradient)
                log["disc_factor"] = torch.tensor(self.disc_factor)
                log["d_weight"], log["g_loss"] = weight, adversarial
                value = value + weight * self.disc_factor * adversarial
                gradient = gradient + weight * self.disc_factor * adversarial_gradient
            pairs = [reconstructions, gradient.to(reconstructions.dtype)]
            for tensor, known_gradient in zip(sources[1:], rest, strict=True):
                pairs += [tensor, known_gradient]
            value = KnownGradient.apply(value, *pairs)
        total = value + kl_weight * kl_loss
        log = {"total_loss": total, "kl_loss": kl_loss, "logvar": self.logvar, **log}
        return total, {f"{split}/{key}": term.detach().clone() for key, term in log.items()}

    def discriminator_loss(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        cond: Tensor | None = None,
        *,
        forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's loss, a scalar, and its log with keys `train/...`.

        Args:
            inputs: real images [B, C, H, W].
            reconstructions: reconstructions of the same shape, which receive no gradient.
            cond: see `forward`.
            forward: computes the logits of (real, fake). In distributed training this is a
                `RealAndFake` wrapped in DistributedDataParallel, which supports only one forward
                call per backward.
        """
        run = forward or RealAndFake(self.discriminator)
        real, fake = run(self._seen(inputs, cond), self._seen(reconstructions.detach(), cond))
        real, fake = real.float(), fake.float()
        loss = self.disc_factor * discriminator_loss(real, fake, self.disc_loss)
        log = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.lecam_weight > 0:
            log["lecam"] = lecam(real, fake, self.logits_average[0], self.logits_average[1])
            loss = loss + self.lecam_weight * log["lecam"]
        return loss, {f"train/{key}": term.detach() for key, term in log.items()}

    def running_statistics(self) -> list[Tensor]:
        """Return the floating-point buffers that discriminator passes update."""
        buffers = [*self.discriminator.buffers(), *self.buffers(recurse=False)]
        return [buffer for buffer in buffers if buffer.is_floating_point()]

    def logits_to_note(self, log: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the mean logits in a log whose means over the ranks `note_logits` needs."""
        if self.lecam_weight == 0:
            return []
        return [log[f"train/logits_{kind}"].float() for kind in ("real", "fake")]

    @torch.no_grad()
    def note_logits(self, means: Tensor) -> None:
        """Update the LeCam averages, after a discriminator step.

        Args:
            means: of `logits_to_note` over all ranks, stacked, on the CPU.
        """
        if self.lecam_weight > 0:
            means = copy_to_device(means, self.logits_average.device)
            self.logits_average.lerp_(means, 1.0 - self.lecam_decay)

    def check_last_layer(self, last_layer: Tensor | None) -> None:
        """Raise ValueError if the weighting is adaptive and the last layer needs no gradient."""
        if self.disc_weighting != "fixed" and (last_layer is None or not last_layer.requires_grad):
            raise ValueError(
                f"disc_weighting={self.disc_weighting}: needs the gradient of the last layer, "
                "which is frozen or missing; set disc_weighting: fixed"
            )

    def _nll(self, x: Tensor, x_hat: Tensor, perceptual: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the negative log-likelihood, a scalar, and its terms, in float32."""
        difference = x - x_hat
        error = difference.abs() if self.reconstruction == "l1" else difference.square()
        rec_loss = self.pixelloss_weight * error.mean()
        log = {}
        if perceptual and self.perceptual_loss is not None and self.perceptual_weight > 0:
            log["p_loss"] = self.perceptual_loss(x, x_hat).mean()
            rec_loss = rec_loss + self.perceptual_weight * log["p_loss"]
        nll = rec_loss / self.logvar.exp() + self.logvar
        if self.reduction == "sum":
            nll = nll * x[0].numel()
        return nll, {"nll_loss": nll, "rec_loss": rec_loss, **log}

    def _adversarial(self, x_hat: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the adversarial term, a scalar, and its gradient at x_hat [B, C, H, W]."""
        # detached parameters: D receives no gradient
        frozen = {key: p.detach() for key, p in self.discriminator.named_parameters()}
        logits: Tensor = functional_call(self.discriminator, frozen, (self._seen(x_hat, cond),))
        with torch.autocast(x_hat.device.type, enabled=False):
            term = generator_loss(logits.float(), self.disc_loss)
            return term.detach(), gradient_at(term, x_hat, logits.numel())

    def _weight(
        self,
        reconstructions: Tensor,
        last_layer: Tensor | None,
        nll_gradient: Tensor,
        adversarial_gradient: Tensor,
    ) -> Tensor:
        """Return the weight of the adversarial term, a scalar."""
        self.check_last_layer(last_layer)
        if last_layer is None or self.disc_weighting == "fixed":
            return torch.full((), self.disc_weight, device=nll_gradient.device)
        over_ranks = self.disc_weighting == "global"
        return self.disc_weight * ratio_at_last_layer(
            reconstructions,
            last_layer,
            nll_gradient,
            adversarial_gradient,
            over_ranks=over_ranks,
        )

    def _seen(self, image: Tensor, cond: Tensor | None) -> Tensor:
        """Return the input of the discriminator: the image, with `cond` if conditional."""
        if not self.disc_conditional:
            return image
        if cond is None:
            raise ValueError(
                "disc_conditional=True: needs cond [B, C, H, W], which the training command does "
                "not provide; set disc_conditional to false, or call the loss with cond"
            )
        return torch.cat([image, cond], dim=1)


def _perceptual_loss(config: AdversarialConfig) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the perceptual distance (x, x_rec) -> [B, 1, 1, 1]; None if its weight is 0."""
    if not isinstance(config.perceptual, str):
        return config.perceptual
    if config.perceptual_weight == 0:
        return None
    try:
        return LPIPS(
            config.perceptual,
            linear=config.perceptual_linear,
            features=config.perceptual_features,
            heads=config.perceptual_heads,
        )
    except ValueError as error:
        key = "model.params.lossconfig.params.perceptual"
        raise ValueError(
            f"lossconfig.params.perceptual={config.perceptual}: {error}; in a config, set "
            f"{key}_features=FILE, {key}_heads=FILE and {key}_linear=false, or disable LPIPS "
            f"with {key}_weight=0.0"
        ) from None


class KnownGradient(torch.autograd.Function):
    """Scalar with precomputed gradients with respect to given tensors.

    `KnownGradient.apply(value, x, x_gradient, y, y_gradient, ...)` returns `value`; its backward
    returns x_gradient times the upstream gradient for x, and so on.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors_and_gradients: Tensor) -> Tensor:
        """Return a copy of `value`."""
        ctx.save_for_backward(*tensors_and_gradients[1::2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of each tensor, and None for the value and the gradients."""
        gradients: list[Tensor | None] = [None]
        for gradient in ctx.saved_tensors:
            gradients += [scales[0] * gradient, None]
        return tuple(gradients)


def gradient_at(total: Tensor, x: Tensor, values: int) -> Tensor:
    """Return the gradient of a mean over `values` values with respect to x, in the shape of x.

    Each value has a gradient of 1 / values, which half precision might round to 0. The mean is
    therefore scaled by a power of two near the number of values, and the gradient is divided by it.
    """
    scale = 2.0 ** math.ceil(math.log2(max(values, 1)))
    (gradient,) = torch.autograd.grad(total * scale, x)
    return gradient.float() / scale


def last_layer_gradient(reconstructions: Tensor, last_layer: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of `last_layer` for a gradient at the reconstructions [B, C, H, W].

    This differentiates through the last layer only. The gradient is scaled to the range of half
    precision, and the result is scaled back.
    """
    size = gradient.abs().sum().clamp_min(1e-20)  # keeps the scale finite for zero gradients
    scale = torch.exp2(10.0 - size.log2().floor())
    (induced,) = torch.autograd.grad(
        reconstructions, last_layer, gradient * scale, retain_graph=True
    )
    return induced.float() / scale


def ratio_at_last_layer(
    reconstructions: Tensor,
    last_layer: Tensor,
    gradient: Tensor,
    other: Tensor,
    *,
    over_ranks: bool,
) -> Tensor:
    """Return the ratio of two gradient norms at the last layer, a scalar.

    See Esser et al. (2021), eq. 7.

    Args:
        reconstructions: [B, C, H, W], with their graph.
        last_layer: weight of the convolution that computed them.
        gradient: gradient at the reconstructions for the numerator, [B, C, H, W].
        other: gradient at the reconstructions for the denominator, [B, C, H, W].
        over_ranks: average the gradients of the last layer over all ranks before taking norms.
    """
    induced = torch.stack(
        [last_layer_gradient(reconstructions, last_layer, g).flatten() for g in (gradient, other)]
    )
    if over_ranks:
        induced = mean_over_ranks(induced)
    norm, other_norm = induced.norm(dim=1)
    ratio: Tensor = norm / (other_norm + 1e-4)
    return ratio.clamp(0.0, MAX_RATIO)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, or the tensor itself in a single process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    x = x.detach().clone()  # all_reduce works in place
    dist.all_reduce(x)
    return x / dist.get_world_size()
