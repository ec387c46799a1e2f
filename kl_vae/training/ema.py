"""The exponential moving average of the autoencoder's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kl_vae.model import AutoEncoderKL


class WeightAverage:
    """A moving average of weights: average = decay * average + (1 - decay) * weights.

    After n updates the decay is at most (1 + n) / (10 + n), as in TensorFlow's
    ExponentialMovingAverage, so that the initial weights decay quickly. All tensors are
    averaged in one asynchronous call on their device.

    Args:
        model: the autoencoder; its loss is not averaged.
        decay: in [0, 1).

    Attributes:
        model: an autoencoder with the averaged weights, in eval mode and without a loss.
        updates: number of updates.
    """

    def __init__(self, model: AutoEncoderKL, decay: float) -> None:
        self._source = model.without_loss()
        self._decay = decay
        self.model: AutoEncoderKL = copy.deepcopy(self._source).requires_grad_(False).eval()
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        n = self.updates
        weight = 1.0 - min(self._decay, (1 + n) / (10 + n)) if n else 1.0  # the first is a copy
        average: list[Tensor] = [*self.model.parameters()]
        current: list[Tensor] = [*self._source.parameters()]
        torch._foreach_lerp_(average, current, weight)
        for buffer, value in zip(self.model.buffers(), self._source.buffers(), strict=True):
            buffer.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights, under the model's own keys."""
        return self.model.state_dict()

    def load_state_dict(self, weights: dict[str, Tensor], updates: int) -> None:
        """Load averaged weights and their number of updates."""
        self.model.load_state_dict(weights)
        self.updates = updates
