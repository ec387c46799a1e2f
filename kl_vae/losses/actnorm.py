"""Activation normalisation, one of the discriminator's norms.

B batch, C channels, H and W height and width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ActNorm(nn.Module):
    """scale * (x + loc), [B, C, H, W] -> same (Kingma & Dhariwal 2018, section 3.1).

    The first training batch sets loc = -mean and scale = 1 / (std + 1e-6) for each channel, so that
    it leaves with mean 0 and variance 1; from then on both are trained as any parameter. Mean and
    standard deviation (unbiased) are over the batches of all ranks, so that the ranks stay equal:
    all of them must run this batch. A first batch that is not finite, or has one value a channel,
    changes nothing; the next one counts as the first.

    Args:
        channels: C.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        # what is known of the buffer without waiting for the device
        self._known_initialized = False
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._known_initialized:
            self._known_initialized = bool(self.initialized.item()) or self._initialize(x)
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> bool:
        """Set loc and scale from a batch, and say whether it could be done."""
        values = x.float().transpose(0, 1).flatten(1)  # [C, B * H * W]
        count = values.new_tensor([values.shape[1]])
        sums = _sum_over_ranks(torch.cat((values.sum(dim=1), count)))  # [C + 1], the count last
        mean = sums[:-1] / sums[-1]
        deviations = _sum_over_ranks((values - mean[:, None]).square().sum(dim=1))
        std = (deviations / (sums[-1] - 1.0)).sqrt()
        # the same on every rank, for these are sums over all
        if not (mean + std).isfinite().all():
            return False
        self.loc.copy_(-mean.view_as(self.loc))
        self.scale.copy_(1.0 / (std.view_as(self.scale) + 1e-6))
        self.initialized.fill_(1)
        return True


def _forget(module: ActNorm, incompatible_keys: object) -> None:
    module._known_initialized = False


def _sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, in place; of one rank alone its own values."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
