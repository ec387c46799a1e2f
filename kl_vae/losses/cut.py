"""Gradients at the cut: what is known at the reconstruction goes on into the autoencoder at once.

B batch, C channels, H and W the image's height and width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_RATIO = 1e4


class KnownGradient(torch.autograd.Function):
    """A scalar whose gradients with respect to some tensors are known already.

    `KnownGradient.apply(value, x, x_gradient, y, y_gradient, ...)` returns `value`; its backward
    gives x the gradient x_gradient, times what comes from above, and so on.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors_and_gradients: Tensor) -> Tensor:
        """Return a copy of `value`."""
        ctx.save_for_backward(*tensors_and_gradients[1::2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        """Give each tensor its gradient, none to the value and to the gradients."""
        gradients: list[Tensor | None] = [None]
        for gradient in ctx.saved_tensors:
            gradients += [scales[0] * gradient, None]
        return tuple(gradients)


def gradient_at(total: Tensor, x: Tensor, values: int) -> Tensor:
    """The gradient of a mean over `values` values with respect to x, of x's shape.

    Each of them has a gradient of 1 / values, which half precision would round to 0: the sum is
    differentiated (up to a power of two) and divided afterwards.
    """
    scale = 2.0 ** math.ceil(math.log2(max(values, 1)))
    (gradient,) = torch.autograd.grad(total * scale, x)
    return gradient.float() / scale


def last_layer_gradient(reconstructions: Tensor, last_layer: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of `last_layer` that a gradient at the reconstructions [B, C, H, W] induces.

    Goes back through the last layer alone. It is linear in the gradient, which is therefore brought
    to a size that half precision holds and the result brought back.
    """
    size = gradient.abs().sum().clamp_min(1e-20)  # of zeros, too, a finite scale
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
    """How much larger one gradient at the reconstructions is than another, a scalar.

    Esser et al. (2021, eq. 7): measured by the norms of what they induce at the last layer.

    Args:
        reconstructions: [B, C, H, W], with their graph.
        last_layer: the weight of the convolution that made them.
        gradient: of the numerator, [B, C, H, W].
        other: of the denominator, [B, C, H, W].
        over_ranks: average what they induce over all ranks before the norms are taken.
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
    """The mean of a tensor over all ranks; of one process the tensor itself."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    x = x.detach().clone()  # reduced in place
    dist.all_reduce(x)
    return x / dist.get_world_size()
