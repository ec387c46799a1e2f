"""One optimisation step: micro-batches forward and backward, then the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kl_vae.data import Batch, normalized
from kl_vae.losses.equivariance import Equivariance
from kl_vae.model import AutoEncoderKL, StepOutput
from kl_vae.runtime.device import autocast
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.randomness import generator_for
from kl_vae.training.config import RunConfig
from kl_vae.training.figures import latent_moments
from kl_vae.training.guards import BadImages, Seen, which_to_take
from kl_vae.training.state import TrainingState

_LOSSES = ("train/total_loss", "train/disc_loss")


@dataclass
class TrainingStep:
    """What a step works with. A call takes the next step and counts it in `state`.

    Attributes:
        state: what a step changes.
        autoencoder: the model, in DistributedDataParallel where there are several ranks.
        discriminator: `RealAndFake` of the discriminator, wrapped likewise; None: there is none.
        config: of the run.
        ranks: that step together.
        total_steps: of the run.
        bad_images: those met so far.
    """

    state: TrainingState
    autoencoder: nn.Module
    discriminator: nn.Module | None
    config: RunConfig
    ranks: Ranks
    total_steps: int
    bad_images: BadImages

    def __call__(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Take a step's micro-batches and update the parameters.

        Returns:
            What this rank measured, each the mean over its micro-batches: "train/..." of the losses
            and the latents, psnr (dB), norms of gradients (before clipping) and learning rates.

        Raises:
            RunError: too many steps in a row without finite numbers, or no image in place of a bad
                one.
        """
        state, micro_batches = self.state, self.config.training.accumulate_batches
        adversary = state.model.adversary
        discriminates = adversary is not None and adversary.discriminates(state.step)
        before = []
        if adversary is not None and discriminates:
            before = [statistic.clone() for statistic in adversary.running_statistics()]
        means: dict[str, Tensor] = {}
        seen: list[Seen] = []
        for micro in range(micro_batches):
            batch, last = next(batches), micro == micro_batches - 1
            with nullcontext() if last else _no_sync(self.autoencoder):
                out, figures = self._autoencoder_pass(batch, micro)
            if discriminates:
                with nullcontext() if last else _no_sync(self.discriminator):
                    figures |= self._discriminator_pass(out.target, out.reconstruction.detach())
            del out  # and with it the graph
            losses = [value for key, value in figures.items() if key in _LOSSES]
            seen.append(Seen(sum(losses, torch.tensor(0.0)), batch.names, batch.bad))
            for key, value in figures.items():
                means[key] = means.get(key, 0.0) + value / micro_batches
        return {**means, **self._update(discriminates, before, means, seen)}

    def _autoencoder_pass(self, batch: Batch, micro: int) -> tuple[StepOutput, dict[str, Tensor]]:
        """Add the gradient of a micro-batch; return the pass and what was measured on it."""
        training, device, step = self.config.training, self.ranks.device, self.state.step
        # dropout too is a function of the step, so that nothing need be kept of it to resume
        dropout = generator_for("dropout", training.seed, step, self.ranks.rank, micro)
        torch.manual_seed(dropout.initial_seed())
        noise = latent_noise(self.state.model, batch, "posterior", training.seed, step)
        images = to_device(batch.images, device, training.channels_last)
        with autocast(device, training.precision):
            out = self.state.model.step(
                images,
                step,
                "train",
                forward=self.autoencoder,
                noise=noise_to_device(noise, device),
                equivariance=Equivariance.draw(
                    training.equivariance, training.equivariance_min_scale, training.seed, step
                ),
            )
        self.state.updater.backward(out.total / training.accumulate_batches)
        mse = (out.target - out.reconstruction.detach()).square().flatten(1).mean(dim=1)
        psnr = 10.0 * (4.0 / mse).log10().mean()
        return out, {**out.log, **latent_moments(out.posterior, "train"), "train/psnr": psnr}

    def _discriminator_pass(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Add the discriminator's gradient on images [B, C, H, W]; return its log."""
        adversary, updater = self.state.model.adversary, self.state.discriminator_updater
        assert adversary is not None and updater is not None
        with autocast(self.ranks.device, self.config.training.precision):
            loss, log = adversary.discriminator_loss(real, fake, forward=self.discriminator)
        updater.backward(loss / self.config.training.accumulate_batches)
        return log

    def _update(
        self,
        discriminates: bool,
        before: list[Tensor],
        means: Mapping[str, Tensor],
        seen: Sequence[Seen],
    ) -> dict[str, Tensor]:
        """Update all that learns in this step; return norms of gradients and learning rates."""
        state, figures = self.state, {}
        updaters = state.updaters[: 1 + discriminates]
        norms = [updater.unscale() for updater in updaters]
        taken = which_to_take(
            *(updaters, norms, seen, self.ranks, state.skips, self.bad_images, state.step + 1),
            max_skipped_steps=self.config.training.max_skipped_steps,
        )
        for updater, norm, take in zip(updaters, norms, taken, strict=True):
            updater.update(norm, take, state.step, self.total_steps)
            prefix = "train/" if updater is state.updater else "train/disc_"
            figures[f"{prefix}grad_norm"] = norm
            figures[f"{prefix}learning_rate"] = torch.tensor(updater.learning_rate)
        if taken[0] and state.average is not None:
            state.average.update()
        if discriminates and state.model.adversary is not None:
            if all(taken):
                state.model.adversary.note_logits(
                    means["train/logits_real"], means["train/logits_fake"]
                )
            else:  # what a step that is left out has seen must not stay in running statistics
                statistics = state.model.adversary.running_statistics()
                for statistic, value in zip(statistics, before, strict=True):
                    statistic.copy_(value)
        state.step += 1
        state.images_seen += self.config.training.global_batch_size
        return figures


def _no_sync(module: nn.Module | None) -> AbstractContextManager[None]:
    """Keep the gradients of this pass on the rank, where there are several."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def latent_noise(model: AutoEncoderKL, batch: Batch, purpose: str, *key: int) -> Tensor:
    """Standard normal noise [B, z, h, w]: each sample's a function of the key and its position."""
    f = model.downsampling_factor
    shape = (model.latent_channels, batch.images.shape[2] // f, batch.images.shape[3] // f)
    return torch.stack(
        [
            torch.randn(shape, generator=generator_for(purpose, *key, int(position)))
            for position in batch.positions
        ]
    )


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Move a batch [B, C, H, W] to the device, there float32 in [-1, 1] in the model's layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # uint8 until then: a quarter of the bytes to move
    return normalized(images.to(device, non_blocking=True).contiguous(memory_format=layout))


def noise_to_device(noise: Tensor, device: torch.device) -> Tensor:
    """Move noise to the device; nothing waits for the copy, which pinned memory alone allows."""
    if device.type == "cuda":
        noise = noise.pin_memory()
    return noise.to(device, non_blocking=True)
