"""The exponential moving average of the autoencoder's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kl_vae.model import AutoEncoderKL


class WeightAverage:
    """Averages weights after each step: average = decay * average + (1 - decay) * weights.

    Of the first steps it forgets faster, with decay (1 + n) / (10 + n) after n of them, so that
    the initial weights do not stay in it (Tensorflow's ExponentialMovingAverage). All tensors are
    averaged at once, on their device, which nothing waits for.

    Args:
        model: whose encoder, decoder and quant convolutions are averaged; a loss has no average.
        decay: in the long run.

    Attributes:
        model: an autoencoder with the averaged weights, in eval mode and without a loss.
        updates: how many times it was updated.
    """

    def __init__(self, model: AutoEncoderKL, decay: float) -> None:
        self._source = model.without_loss()
        self._decay = decay
        self.model: AutoEncoderKL = copy.deepcopy(self._source).requires_grad_(False).eval()
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's weights as they are now."""
        n = self.updates
        weight = 1.0 - min(self._decay, (1 + n) / (10 + n)) if n else 1.0  # the first is a copy
        average: list[Tensor] = [*self.model.parameters()]
        current: list[Tensor] = [*self._source.parameters()]
        torch._foreach_lerp_(average, current, weight)
        for buffer, value in zip(self.model.buffers(), self._source.buffers(), strict=True):
            buffer.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the model's own keys."""
        return self.model.state_dict()

    def load_state_dict(self, weights: dict[str, Tensor], updates: int) -> None:
        """Take up weights that had been updated so many times."""
        self.model.load_state_dict(weights)
        self.updates = updates
