"""One optimisation step: micro-batches forward and backward, then the update.

B batch, C channels, H and W the image's height and width, z latent channels, h = H/f, w = W/f.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kl_vae.data import Batch, normalized
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.losses.discriminator import RealAndFake
from kl_vae.losses.equivariance import Equivariance
from kl_vae.model import AutoEncoderKL
from kl_vae.optim.config import set_learning_rate
from kl_vae.runtime.device import PRECISIONS, copy_to_device
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.randomness import generator_for, normal_noise
from kl_vae.training.config import RunConfig
from kl_vae.training.guards import BadImages, MicroBatch, StopRequest, agree_on_step
from kl_vae.training.state import TrainingState


class StepResult(NamedTuple):
    """What a step returns."""

    metrics: dict[str, Tensor]  # of this rank, means over its micro-batches
    stop: bool  # a rank has been asked to stop


class TrainingStep:
    """An optimisation step over all ranks; each call takes the next step and counts it in `state`.

    Args:
        state: updated by each step.
        config: of the run.
        ranks: all ranks of the run.
        total_steps: of the run, for the learning rate.
        bad_images: list of unusable images, updated.
    """

    def __init__(
        self,
        state: TrainingState,
        config: RunConfig,
        ranks: Ranks,
        total_steps: int,
        bad_images: BadImages,
    ) -> None:
        self.state = state
        self.config = config
        self.ranks = ranks
        self.total_steps = total_steps
        self.bad_images = bad_images
        # each network has a DistributedDataParallel of its own, whose backward averages gradients
        self.ddp_discriminator: nn.Module | None = None
        if state.model.adversary is None:
            self.ddp_autoencoder = distribute(state.model, ranks)
        else:  # which is part of the model, but is not reached by the autoencoder's backward
            discriminator = state.model.adversary.discriminator
            self.ddp_discriminator = distribute(RealAndFake(discriminator), ranks)
            discriminator.requires_grad_(False)
            self.ddp_autoencoder = distribute(state.model, ranks)
            discriminator.requires_grad_(True)

    def __call__(self, batches: Iterator[Batch], stop: StopRequest | None = None) -> StepResult:
        """Pass the step's micro-batches through the networks and update their parameters.

        Args:
            batches: this rank's micro-batches, of which a step takes `accumulate_batches`.
            stop: whether this rank was asked to stop; shared with the flags of the step.

        Returns:
            Metrics under "train/" (losses, moments of the latents, PSNR in dB, gradient norms
            before clipping, learning rates), and whether any rank has been asked to stop.

        Raises:
            RunError: too many consecutive non-finite steps, or no image could replace a bad one.
        """
        state, training, device = self.state, self.config.training, self.ranks.device
        model, micro_batches = state.model, training.accumulate_batches
        autocast = torch.amp.autocast(
            device.type, PRECISIONS[training.precision], enabled=training.precision != "fp32"
        )
        equivariance = Equivariance.draw(
            training.equivariance, training.equivariance_min_scale, training.seed, state.step
        )
        adversary = model.adversary
        if adversary is not None and not adversary.discriminates(state.step):
            adversary = None  # the discriminator does not run before disc_start
        networks = [state.autoencoder] if adversary is None else state.networks
        statistics = [] if adversary is None else adversary.running_statistics()
        statistics_before = [statistic.clone() for statistic in statistics]

        means: dict[str, Tensor] = {}
        seen: list[MicroBatch] = []
        for micro in range(micro_batches):
            batch = next(batches)
            last = micro == micro_batches - 1  # its backward averages the gradients over the ranks
            images = to_device(batch.images, device, training.channels_last)
            noise = posterior_noise(model, batch, "posterior", training.seed, state.step)
            noise = copy_to_device(noise, device)
            # dropout is a function of the step too, so that a resumed run repeats it
            dropout = generator_for("dropout", training.seed, state.step, self.ranks.rank, micro)
            torch.manual_seed(dropout.initial_seed())

            with nullcontext() if last else no_sync(self.ddp_autoencoder):
                with autocast:
                    out = model.step(
                        images,
                        state.step,
                        "train",
                        forward=self.ddp_autoencoder,
                        noise=noise,
                        equivariance=equivariance,
                    )
                scaler: torch.amp.GradScaler = state.autoencoder.scaler  # scales in fp16 only
                scaler.scale(out.total / micro_batches).backward()  # type: ignore[no-untyped-call]
            metrics = {**out.log, **latent_moments(out.posterior, "train")}
            metrics["train/psnr"] = mean_psnr(out.target, out.reconstruction.detach())
            loss = metrics["train/total_loss"]

            if adversary is not None:
                with nullcontext() if last else no_sync(self.ddp_discriminator):
                    with autocast:
                        disc_loss, log = adversary.discriminator_loss(
                            out.target, out.reconstruction.detach(), forward=self.ddp_discriminator
                        )
                    scaler = networks[1].scaler
                    scaler.scale(disc_loss / micro_batches).backward()  # type: ignore[no-untyped-call]
                metrics |= log
                loss = loss + metrics["train/disc_loss"]

            del out  # and with it the graph
            seen.append(MicroBatch(loss, batch.names, batch.bad))
            for key, value in metrics.items():
                means[key] = means.get(key, 0.0) + value / micro_batches

        # update all networks on all ranks, or none if a value is not finite
        norms = []
        for network in networks:
            network.scaler.unscale_(network.optimizer)
            gradients = [p.grad for p in network.parameters if p.grad is not None]
            norms.append(nn.utils.get_total_norm(gradients).detach())
        verdict = agree_on_step(
            seen,
            norms,
            [network.scaler for network in networks],
            step=state.step + 1,
            skips=state.skips,
            ranks=self.ranks,
            bad_images=self.bad_images,
            max_skipped_steps=training.max_skipped_steps,
            stop_requested=stop is not None and stop.requested,
            averaged=[] if adversary is None else adversary.logits_to_note(means),
        )
        for network, norm, take in zip(networks, norms, verdict.take, strict=True):
            rate = set_learning_rate(
                network.optimizer, state.step, self.total_steps, network.config
            )
            if take:
                if network.config.clip_grad_norm is not None:
                    nn.utils.clip_grads_with_norm_(
                        network.parameters, network.config.clip_grad_norm, norm
                    )
                # not scaler.step, which would read again whether the gradient is finite
                network.optimizer.step()
            network.scaler.update()  # halves the scale if the gradient was not finite
            network.optimizer.zero_grad(set_to_none=True)
            prefix = "train/" if network is state.autoencoder else "train/disc_"
            means[f"{prefix}grad_norm"] = norm
            means[f"{prefix}learning_rate"] = torch.tensor(rate)
        if verdict.take[0] and state.average is not None:
            state.average.update()
        if adversary is not None and all(verdict.take):
            adversary.note_logits(verdict.means)
        else:  # a skipped step does not change the discriminator's running statistics
            for statistic, value in zip(statistics, statistics_before, strict=True):
                statistic.copy_(value)
        state.step += 1
        state.images_seen += training.global_batch_size
        return StepResult(means, verdict.stop)


# renamed in torch 2.15, where the old name gives a warning
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


def distribute(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Wrap a module in DistributedDataParallel, if there are several ranks."""
    if ranks.world_size == 1:
        return module
    options: dict[str, Any] = {_SYNC_BUFFERS: False}
    if ranks.device.type == "cuda":
        options["device_ids"] = [ranks.device]
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **options)


def no_sync(module: nn.Module | None) -> AbstractContextManager[None]:
    """Keep the gradients of this pass on the rank; later passes add to them."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def posterior_noise(model: AutoEncoderKL, batch: Batch, purpose: str, *key: int) -> Tensor:
    """Return normal noise [B, z, h, w] of a batch: a function of the key and the positions."""
    f = model.downsampling_factor
    shape = (model.latent_channels, batch.images.shape[2] // f, batch.images.shape[3] // f)
    return torch.stack(
        [normal_noise(shape, purpose, *key, int(position)) for position in batch.positions]
    )


def latent_moments(posterior: DiagonalGaussianDistribution, split: str) -> dict[str, Tensor]:
    """Return E[z] and E[z^2] of the posterior's samples per channel, [z] each.

    Their means over batches and ranks are exact; `kl_vae.training.logging.to_numbers` turns them
    into mean and standard deviation.
    """
    mean, var = posterior.mean.detach(), posterior.var.detach()
    return {
        f"{split}/latent_mean": mean.mean((0, 2, 3)),
        f"{split}/latent_square": (mean.square() + var).mean((0, 2, 3)),
    }


def mean_psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean PSNR in dB, a scalar, of images [B, C, H, W] in [-1, 1], unclamped."""
    mse = (images - reconstructions).square().flatten(1).mean(dim=1)
    return 10.0 * (4.0 / mse).log10().mean()


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Move a batch [B, C, H, W] to the device, there float32 in [-1, 1] in the model's layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # uint8 until then: a quarter of the bytes to move
    return normalized(images.to(device, non_blocking=True).contiguous(memory_format=layout))
