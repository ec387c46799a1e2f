"""One optimisation step: micro-batches forward and backward, then the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kl_vae.data import Batch
from kl_vae.device import autocast
from kl_vae.model import AutoEncoderKL
from kl_vae.optimizer import set_learning_rate
from kl_vae.randomness import generator_for
from kl_vae.training.config import RunConfig
from kl_vae.training.distributed import Ranks
from kl_vae.training.state import TrainingState

# the run is lost, not unlucky, when this many steps in a row give no finite gradient
MAX_SKIPPED_STEPS = 10


@dataclass
class TrainingStep:
    """What a step works with. `wrapped` is the model in DistributedDataParallel, where there is.

    A call takes the next step and counts it in `state`.
    """

    state: TrainingState
    wrapped: nn.Module
    config: RunConfig
    ranks: Ranks
    total_steps: int
    _skipped_in_a_row: int = 0

    def __call__(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Take a step's micro-batches and update the parameters.

        Returns:
            What this rank measured, each a scalar, the mean over its micro-batches: "train/..." of
            the loss, psnr (dB), grad_norm (before clipping) and learning_rate.

        Raises:
            ValueError: an image that cannot be used.
            RuntimeError: too many steps in a row without a finite gradient.
        """
        micro_batches = self.config.training.accumulate_batches
        means: dict[str, Tensor] = {}
        for micro in range(micro_batches):
            with self._no_sync() if micro < micro_batches - 1 else nullcontext():
                figures = self._accumulate(next(batches), micro)
            for key, value in figures.items():
                means[key] = means.get(key, 0.0) + value / micro_batches
        rate = set_learning_rate(
            self.state.optimizer, self.state.step, self.total_steps, self.config.optimizer
        )
        means["train/grad_norm"] = self._update()
        means["train/learning_rate"] = torch.tensor(rate, dtype=torch.float64)
        self.state.step += 1
        self.state.images_seen += self.config.training.global_batch_size
        return means

    def _accumulate(self, batch: Batch, micro: int) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch; return what was measured on it."""
        if any(batch.errors):
            raise ValueError(f"{first_error(batch)}; mend it, or name it in data.train.exclude")
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
                forward=self.wrapped,
                noise=noise.to(device, non_blocking=True),
            )
        loss = self.state.scaler.scale(out.total / training.accumulate_batches)
        loss.backward()  # type: ignore[no-untyped-call]
        mse = (images - out.reconstruction.detach()).square().flatten(1).mean(dim=1)
        return {**out.log, "train/psnr": 10.0 * (4.0 / mse).log10().mean()}

    def _update(self) -> Tensor:
        """Unscale, clip, step; a step without a finite gradient is left out, on all ranks alike."""
        state, bound = self.state, self.config.optimizer.clip_grad_norm
        state.scaler.unscale_(state.optimizer)
        # the gradients are means over all ranks already, so the norm is the same on each
        norm = nn.utils.clip_grad_norm_(
            state.model.parameters(), float("inf") if bound is None else bound
        )
        finite = bool(norm.isfinite())
        if finite or state.scaler.is_enabled():  # the scaler leaves a step out by itself
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.skipped_steps += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise RuntimeError(
                f"{MAX_SKIPPED_STEPS} steps in a row had no finite gradient; lower "
                "optimizer.learning_rate, or set training.precision to bf16 or fp32"
            )
        return norm.detach()

    def _no_sync(self) -> AbstractContextManager[None]:
        if isinstance(self.wrapped, DistributedDataParallel):
            return self.wrapped.no_sync()
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
    """Move a batch [B, C, H, W] to the device, in the memory layout of the model."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).contiguous(memory_format=layout)


def first_error(batch: Batch) -> str:
    """What is wrong with the first image of a batch that could not be read."""
    return next(error for error in batch.errors if error)
