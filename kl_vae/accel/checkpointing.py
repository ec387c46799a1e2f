"""Activation checkpointing: norm, SiLU and convolution that store only their input.

Autograd stores three feature maps: the inputs of the norm, the SiLU and the convolution. Here the
backward pass recomputes the last two from the first (Chen et al. 2016, section 4), which costs two
passes over a feature map in addition to the two backward products of the convolution. Results are
bit-identical to autograd, since the same kernels run on the same feature maps.

Shapes: B batch, C input channels, O output channels, H and W height and width, G groups.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.convolution import (
    CONVOLUTIONS,
    WinogradConv2d,
    convolve,
    convolve_backward,
    is_3_by_3,
    takes,
)
from kl_vae.accel.group_norm import FLOAT32_NORMS
from kl_vae.accel.swap import are_on, is_traced, is_untouched
from kl_vae.blocks import at_least_float32

# Activations that the backward pass recomputes. none: those between a norm and its SiLU; norms:
# also those between the SiLU and its convolution; blocks: whole residual blocks.
ACTIVATION_CHECKPOINTING = ("none", "norms", "blocks")

DEVICES = ("cpu", "cuda")  # devices whose group norm returns its statistics

_aten = torch.ops.aten


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Compute silu(norm(x)), [B, C, H, W]; only x and the statistics are saved for backward.

    The result is float32 under autocast.
    """
    scale: Tensor = norm.weight
    shift: Tensor = norm.bias
    if torch.is_autocast_enabled(x.device.type):
        x, scale, shift = (at_least_float32(t) for t in (x, scale, shift))
    out: Tensor = _NormSilu.apply(x, scale, shift, norm.num_groups, norm.eps)
    return out


def norm_silu_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, residual: Tensor | None = None
) -> Tensor:
    """Compute conv(silu(norm(x))) + residual, [B, O, H, W]; only x and the statistics are saved.

    Under autocast the norm runs in float32 and the convolution in the autocast precision, except
    in float64; x is saved in its own precision.
    """
    kind, weight, bias = x.device.type, conv.weight, conv.bias
    scale: Tensor = norm.weight
    shift: Tensor = norm.bias
    norm_dtype = x.dtype
    if torch.is_autocast_enabled(kind):
        scale, shift = at_least_float32(scale), at_least_float32(shift)
        norm_dtype = scale.dtype
        dtype = torch.get_autocast_dtype(kind) if weight.dtype != torch.float64 else weight.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _NormSiluConv.apply(
        x,
        scale,
        shift,
        weight,
        bias,
        residual,
        norm_dtype,
        norm.num_groups,
        norm.eps,
        (conv.stride, conv.padding, conv.dilation),
        isinstance(conv, WinogradConv2d) and is_3_by_3(conv) and takes(conv, x),
    )
    return out


def takes_norm(norm: nn.Module, x: Tensor) -> TypeGuard[nn.GroupNorm]:
    """Return whether `norm_silu` can replace `norm`: an unmodified group norm, with gradients.

    It is false while torch.compile traces, since the compiler decides what to recompute.
    """
    return (
        torch.is_grad_enabled()
        and not is_traced()
        and x.device.type in DEVICES
        and is_untouched(norm, *FLOAT32_NORMS)
        and are_on(x.device, *norm.parameters())
    )


def takes_conv(conv: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Return whether `norm_silu_conv` can replace `conv`: an unmodified, zero-padded Conv2d."""
    return (
        is_untouched(conv, *CONVOLUTIONS)
        and isinstance(conv, nn.Conv2d)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and are_on(x.device, *conv.parameters())
    )


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float
    ) -> Tensor:
        ctx.settings = groups, eps
        normed, mean, rstd = _normalize(x, scale, shift, groups, eps)
        ctx.save_for_backward(x, scale, shift, mean, rstd)
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale, shift, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            plain = F.silu(F.group_norm(x, ctx.settings[0], scale, shift, ctx.settings[1]))
            return (*_differentiate(plain, (x, scale, shift), gradient, ctx), None, None)
        normed, _, _ = _normalize(x, scale, shift, *ctx.settings)
        gradient = _aten.silu_backward(gradient, normed)
        groups = ctx.settings[0]
        needed = ctx.needs_input_grad[:3]
        return (*_norm_backward(gradient, x, mean, rstd, scale, groups, needed), None, None)


class _NormSiluConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        norm_dtype: torch.dtype,
        groups: int,
        eps: float,
        geometry: tuple[Any, Any, Any],
        winograd: bool,
    ) -> Tensor:
        ctx.settings = norm_dtype, groups, eps, geometry, winograd
        ctx.residual_dtype = None if residual is None else residual.dtype
        normed, mean, rstd = _normalize(x.to(norm_dtype), scale, shift, groups, eps)
        ctx.save_for_backward(x, scale, shift, weight, bias, mean, rstd)
        active = F.silu(normed, inplace=True).to(weight.dtype)
        if winograd:
            return convolve(active, weight, bias, residual)
        out = F.conv2d(active, weight, bias, *geometry)
        if residual is None:
            return out
        return out.add_(residual) if out.dtype == residual.dtype else out + residual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale, shift, weight, bias, mean, rstd = ctx.saved_tensors
        norm_dtype, groups, eps, geometry, winograd = ctx.settings
        residual_gradient = None if ctx.residual_dtype is None else gradient.to(ctx.residual_dtype)
        rest = residual_gradient, None, None, None, None, None
        gradient = gradient.to(weight.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            active = F.silu(F.group_norm(x.to(norm_dtype), groups, scale, shift, eps))
            plain = F.conv2d(active.to(weight.dtype), weight, bias, *geometry)
            inputs = x, scale, shift, weight, bias
            return (*_differentiate(plain, inputs, gradient, ctx), *rest)

        before, needed = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad
        x_normed = x.to(norm_dtype)
        normed, _, _ = _normalize(x_normed, scale, shift, groups, eps)
        active = F.silu(normed).to(weight.dtype)
        conv_needed = before, needed[3], needed[4]
        if winograd:
            inner, weight_gradient, bias_gradient = convolve_backward(
                gradient, active, weight, bias is not None, conv_needed
            )
        else:
            inner, weight_gradient, bias_gradient = _aten.convolution_backward(
                gradient,
                active,
                weight,
                None if bias is None else bias.shape,
                *geometry,
                False,
                [0, 0],
                1,
                conv_needed,
            )
        del gradient, active  # free feature maps early
        norm_gradients: tuple[Tensor | None, ...] = None, None, None
        if inner is not None:
            inner = inner.to(norm_dtype)
            _aten.silu_backward.grad_input(inner, normed, grad_input=inner)
            del normed
            norm_gradients = _norm_backward(inner, x_normed, mean, rstd, scale, groups, needed[:3])
        x_gradient = None if norm_gradients[0] is None else norm_gradients[0].to(x.dtype)
        return (x_gradient, *norm_gradients[1:], weight_gradient, bias_gradient, *rest)


def _normalize(
    x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the group norm of x, and the mean and reciprocal std of each group, [B, G]."""
    x = _laid_out(x, x)
    batch, channels, height, width = x.shape
    normed, mean, rstd = _aten.native_group_norm(
        x, scale, shift, batch, channels, height * width, groups, eps
    )
    return normed, mean, rstd


def _norm_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    groups: int,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, scale and shift, None where not `needed`."""
    batch, channels, height, width = x.shape
    x_gradient, scale_gradient, shift_gradient = _aten.native_group_norm_backward(
        _laid_out(gradient, x),
        _laid_out(x, x),
        mean,
        rstd,
        scale,
        batch,
        channels,
        height * width,
        groups,
        list(needed),
    )
    return x_gradient, scale_gradient, shift_gradient


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Convert x to a memory format that native_group_norm supports; channels_last on CPUs only."""
    if like.device.type == "cpu" and like.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _differentiate(
    out: Tensor, inputs: tuple[Tensor | None, ...], gradient: Tensor, ctx: Any
) -> list[Tensor | None]:
    """Return differentiable gradients of the inputs, None where not needed."""
    needed = [x is not None and ctx.needs_input_grad[i] for i, x in enumerate(inputs)]
    chosen = [x for x, is_needed in zip(inputs, needed, strict=True) if is_needed and x is not None]
    found = iter(torch.autograd.grad(out, chosen, gradient, create_graph=True))
    return [next(found) if is_needed else None for is_needed in needed]
