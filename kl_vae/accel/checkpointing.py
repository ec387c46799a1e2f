"""Activation checkpointing: norm, SiLU and convolution that keep their input alone.

Autograd keeps three maps of each: the norm's input, the SiLU's and the convolution's. The last two
are computed again from the first when the backward pass needs them (Chen et al. 2016, section 4:
drop what is cheap), which costs two passes over a map beside the convolution's two backward
products. Numbers are those of autograd, bit for bit, since the same kernels run on the same maps.

B batch, C channels of the input, O of the output, H and W height and width, G groups.
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

# What the backward pass computes again. none: what lies between a norm and its SiLU; norms: also
# what lies between the SiLU and its convolution; blocks: whole residual blocks.
ACTIVATION_CHECKPOINTING = ("none", "norms", "blocks")

DEVICES = ("cpu", "cuda")  # whose group norm tells its statistics

_aten = torch.ops.aten


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(x)), [B, C, H, W]; x and the statistics are kept for the backward pass.

    In float32 under autocast.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    out: Tensor = _NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return out


def norm_silu_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, residual: Tensor | None = None
) -> Tensor:
    """conv(silu(norm(x))) + residual, [B, O, H, W]; x and the statistics are kept.

    Under autocast the norm is float32 and the convolution autocast's precision, and x is kept in
    that which it has.
    """
    kind, weight, bias = x.device.type, conv.weight, conv.bias
    norm_dtype = x.dtype
    if torch.is_autocast_enabled(kind):
        dtype, norm_dtype = torch.get_autocast_dtype(kind), torch.float32
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _NormSiluConv.apply(
        x,
        norm.weight,
        norm.bias,
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
    """Whether `norm_silu` stands for the module `norm` with gradients: our group norm, untouched.

    While torch.compile traces it does not: the compiler itself finds what to compute again.
    """
    return (
        torch.is_grad_enabled()
        and not is_traced()
        and x.device.type in DEVICES
        and is_untouched(norm, *FLOAT32_NORMS)
        and are_on(x.device, *norm.parameters())
    )


def takes_conv(conv: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether `norm_silu_conv` stands for the module `conv`: a convolution padded with zeros."""
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
        if torch.is_grad_enabled():  # to be differentiated once more
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
        onward = None if ctx.residual_dtype is None else gradient.to(ctx.residual_dtype)
        rest = onward, None, None, None, None, None
        gradient = gradient.to(weight.dtype)
        if torch.is_grad_enabled():  # to be differentiated once more
            active = F.silu(F.group_norm(x.to(norm_dtype), groups, scale, shift, eps))
            plain = F.conv2d(active.to(weight.dtype), weight, bias, *geometry)
            inputs = x, scale, shift, weight, bias
            return (*_differentiate(plain, inputs, gradient, ctx), *rest)

        before, needed = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad
        x_normed = x.to(norm_dtype)
        normed, _, _ = _normalize(x_normed, scale, shift, groups, eps)
        active = F.silu(normed).to(weight.dtype)
        needed_of_conv = before, needed[3], needed[4]
        if winograd:
            inner, weight_gradient, bias_gradient = convolve_backward(
                gradient, active, weight, bias is not None, needed_of_conv
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
                needed_of_conv,
            )
        del gradient, active  # maps are let go as soon as they can be
        of_norm: tuple[Tensor | None, ...] = None, None, None
        if inner is not None:
            inner = inner.to(norm_dtype)
            _aten.silu_backward.grad_input(inner, normed, grad_input=inner)
            del normed
            of_norm = _norm_backward(inner, x_normed, mean, rstd, scale, groups, needed[:3])
        x_gradient = None if of_norm[0] is None else of_norm[0].to(x.dtype)
        return (x_gradient, *of_norm[1:], weight_gradient, bias_gradient, *rest)


def _normalize(
    x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The group norm of x, and of each group its mean and 1 / its standard deviation, [B, G]."""
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
    """The gradients of x, scale and shift where they are `needed`."""
    batch, channels, height, width = x.shape
    of_x, of_scale, of_shift = _aten.native_group_norm_backward(
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
    return of_x, of_scale, of_shift


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Put x into a memory layout that torch's group norm reads: channels_last on the CPU alone."""
    if like.device.type == "cpu" and like.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _differentiate(
    out: Tensor, inputs: tuple[Tensor | None, ...], gradient: Tensor, ctx: Any
) -> list[Tensor | None]:
    """The gradients of the inputs that need one, with a graph of their own."""
    needed = [x is not None and ctx.needs_input_grad[i] for i, x in enumerate(inputs)]
    chosen = [x for x, is_needed in zip(inputs, needed, strict=True) if is_needed and x is not None]
    found = iter(torch.autograd.grad(out, chosen, gradient, create_graph=True))
    return [next(found) if is_needed else None for is_needed in needed]
