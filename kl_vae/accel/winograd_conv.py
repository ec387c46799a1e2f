"""A convolution that `kl_vae.accel.winograd` computes, and its gradients, where that pays.

B batch, C channels, O channels of the output, H and W height and width.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.winograd import INPUT_GRADIENT, winograd_convolve, winograd_weight_gradient

# below these the direct convolution is as fast (measured)
FEWEST_CHANNELS = 64
FEWEST_POSITIONS = 512
FEWEST_POSITIONS_OF_WEIGHT_GRADIENT = 128

_aten = torch.ops.aten


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 and padding 1 that is computed so where that pays.

    Only the class tells it from `nn.Conv2d`: it has the same parameters, and on another device, in
    another precision or compiled the same forward. `torch.func` can take its gradient, once, but
    cannot map it or differentiate it forwards.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not takes(x, self.weight):
            return super().forward(x)
        out: Tensor = _Convolution.apply(x, self.weight, self.bias)
        return out


def is_3_by_3(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module computes a 3 x 3 convolution of stride 1 and padding 1, and only that.

    A subclass or a parametrization may compute something else.
    """
    return (
        type(module) in (nn.Conv2d, WinogradConv2d)
        and isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.padding == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether `winograd_convolve` is possible for x [B, C, H, W], pays, and needs no gradient."""
    return takes(x, weight) and _positions(x) >= FEWEST_POSITIONS and not torch.is_grad_enabled()


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x [B, C, H, W] and the weight are what these convolutions can take."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """[B, O, H, W]: the convolution of x, + residual, in the way that is faster; without gradients.

    Args:
        x: [B, C, H, W]; `takes`.
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
    """The gradients of x, weight and bias where `needed`, each in the way that is faster.

    Args:
        gradient: of the output, [B, O, H, W].
        x: [B, C, H, W]; `takes`.
        weight: [O, C, 3, 3].
        has_bias: whether there is one.
        needed: which of the three.
    """
    of_x = of_weight = of_bias = None
    fast_x = needed[0] and _positions(x) >= FEWEST_POSITIONS
    fast_weight = needed[1] and _positions(x) >= FEWEST_POSITIONS_OF_WEIGHT_GRADIENT
    if fast_x:
        of_x = winograd_convolve(gradient, weight, None, transforms=INPUT_GRADIENT)
    if fast_weight:
        of_weight = winograd_weight_gradient(x, gradient)
        if has_bias and needed[2]:
            of_bias = gradient.sum((0, 2, 3))
    rest = [needed[0] and not fast_x, needed[1] and not fast_weight, False]
    rest[2] = has_bias and needed[2] and of_bias is None
    if any(rest):
        sizes = [len(weight)] if has_bias else None
        geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        plain = _aten.convolution_backward(gradient, x, weight, sizes, *geometry, rest)
        of_x, of_weight, of_bias = (
            fast if fast is not None else found
            for fast, found in zip((of_x, of_weight, of_bias), plain, strict=True)
        )
    return of_x, of_weight, of_bias


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
        if torch.is_grad_enabled():  # to be differentiated once more
            sizes = [len(weight)] if ctx.has_bias else None
            geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
            needed = list(ctx.needs_input_grad)
            found: tuple[Tensor | None, ...] = _aten.convolution_backward(
                gradient, x, weight, sizes, *geometry, needed
            )
            return found
        return convolve_backward(gradient, x, weight, ctx.has_bias, ctx.needs_input_grad)


def _positions(x: Tensor) -> int:
    """Of one image: the way that it is computed does not depend on the others of its batch."""
    return x.shape[2] * x.shape[3]
