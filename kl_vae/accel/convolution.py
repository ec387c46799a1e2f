"""Convolution that uses `kl_vae.accel.winograd`, also for its gradients, where it is faster.

Shapes: B batch, C input channels, O output channels, H and W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.swap import are_float32_on_cpu, is_own
from kl_vae.accel.winograd import INPUT_GRADIENT, winograd_convolve, winograd_weight_gradient

# below these sizes, direct convolution is as fast (measured)
FEWEST_CHANNELS = 64
FEWEST_POSITIONS = 512
FEWEST_POSITIONS_OF_WEIGHT_GRADIENT = 128

# stride, padding, dilation, transposed, output padding, groups
_GEOMETRY = [1, 1], [1, 1], [1, 1], False, [0, 0], 1

_aten = torch.ops.aten


class WinogradConv2d(nn.Conv2d):
    """3 x 3 convolution of stride 1 and padding 1 that uses Winograd's algorithm where faster.

    It has the same parameters as `nn.Conv2d`, and falls back to its forward if the requirements are
    not met (other devices or precisions, torch.compile, `torch.func`, changed attributes).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (is_own(self, WinogradConv2d) and is_3_by_3(self) and takes(self, x)):
            return super().forward(x)
        out: Tensor = _Convolution.apply(x, self.weight, self.bias)
        return out


CONVOLUTIONS = (nn.Conv2d, WinogradConv2d)


def is_3_by_3(conv: nn.Conv2d) -> bool:
    """Return whether this is a 3 x 3 convolution of stride 1 and zero padding of 1."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def takes(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether `convolve` supports x [B, C, H, W] and the parameters of `conv`."""
    weight = conv.weight
    return (
        are_float32_on_cpu(x, weight, conv.bias)
        and x.dim() == 4
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and weight.shape[2:] == (3, 3)
    )


def suits(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether `winograd_convolve` supports x [B, C, H, W] and is faster, without gradients.

    It is false if gradients are enabled.
    """
    return not torch.is_grad_enabled() and takes(conv, x) and _positions(x) >= FEWEST_POSITIONS


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Compute the convolution of x, plus residual, [B, O, H, W], by the faster algorithm.

    Args:
        x: [B, C, H, W], accepted by `takes`.
        weight: [O, C, 3, 3].
        bias: [O] or None.
        residual: [B, O, H, W] or None.
    """
    if _positions(x) >= FEWEST_POSITIONS:
        return winograd_convolve(x, weight, bias, residual=residual)
    out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else out.add_(residual)


def convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, has_bias: bool, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the needed gradients of x, weight and bias, each by the faster algorithm.

    Args:
        gradient: gradient of the output, [B, O, H, W].
        x: [B, C, H, W], accepted by `takes`.
        weight: [O, C, 3, 3].
        has_bias: whether the convolution has a bias.
        needed: which of the three gradients to compute; the others are None.
    """
    x_gradient = weight_gradient = bias_gradient = None
    fast_x = needed[0] and _positions(x) >= FEWEST_POSITIONS
    fast_weight = needed[1] and _positions(x) >= FEWEST_POSITIONS_OF_WEIGHT_GRADIENT
    if fast_x:
        x_gradient = winograd_convolve(gradient, weight, None, transforms=INPUT_GRADIENT)
    if fast_weight:
        weight_gradient = winograd_weight_gradient(x, gradient)
        if has_bias and needed[2]:
            bias_gradient = gradient.sum((0, 2, 3))
    rest = [needed[0] and not fast_x, needed[1] and not fast_weight, False]
    rest[2] = has_bias and needed[2] and bias_gradient is None
    if any(rest):
        sizes = [len(weight)] if has_bias else None
        plain = _aten.convolution_backward(gradient, x, weight, sizes, *_GEOMETRY, rest)
        x_gradient, weight_gradient, bias_gradient = (
            fast if fast is not None else found
            for fast, found in zip((x_gradient, weight_gradient, bias_gradient), plain, strict=True)
        )
    return x_gradient, weight_gradient, bias_gradient


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            sizes = [len(weight)] if ctx.has_bias else None
            needed = list(ctx.needs_input_grad)
            found: tuple[Tensor | None, ...] = _aten.convolution_backward(
                gradient, x, weight, sizes, *_GEOMETRY, needed
            )
            return found
        return convolve_backward(gradient, x, weight, ctx.has_bias, ctx.needs_input_grad)


def _positions(x: Tensor) -> int:
    """Return the positions per image, so that the algorithm does not depend on the batch size."""
    return x.shape[2] * x.shape[3]
