"""The exponential moving average of the autoencoder's weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from kl_vae.model import AutoEncoderKL


class WeightAverage:
    """Averages weights after each step: average = decay * average + (1 - decay) * weights.

    Of the first steps it forgets faster, with decay (1 + n) / (10 + n) after n of them, so that
    the initial weights do not stay in it (Tensorflow's ExponentialMovingAverage).

    Args:
        model: whose encoder, decoder and quant convolutions are averaged; a loss has no average.
        decay: in the long run.
    """

    def __init__(self, model: AutoEncoderKL, decay: float) -> None:
        self._source = model.without_loss()
        self._averaged = AveragedModel(self._source, multi_avg_fn=self._average)
        self._decay = decay
        self.model.requires_grad_(False).eval()

    @property
    def model(self) -> AutoEncoderKL:
        """An autoencoder with the averaged weights, in eval mode and without a loss."""
        return cast(AutoEncoderKL, self._averaged.module)

    def update(self) -> None:
        """Take in the model's weights as they are now."""
        self._averaged.update_parameters(self._source)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the model's own keys."""
        return self.model.state_dict()

    def load_state_dict(self, weights: dict[str, Tensor], updates: int) -> None:
        """Take up weights that had been updated so many times."""
        self.model.load_state_dict(weights)
        self._averaged.n_averaged.fill_(updates)

    @property
    def updates(self) -> int:
        """How many times it was updated."""
        return int(self._averaged.n_averaged)  # a tensor on the CPU

    def _average(self, average: Iterable[Any], current: Iterable[Any], _: object) -> None:
        n = self.updates
        weight = 1.0 - min(self._decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(average), list(current), weight)
