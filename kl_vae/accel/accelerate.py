"""Which of the fast ways of `kl_vae.accel` a model takes."""

from __future__ import annotations

import logging
from typing import TypeVar

import torch
from torch import nn

from kl_vae.accel.fused import FusedResnetBlock
from kl_vae.accel.winograd_conv import WinogradConv2d, is_3_by_3
from kl_vae.blocks import ResnetBlock, Upsample

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

MODES = ("auto", "exact", "off")


def accelerate(
    model: Model,
    *,
    channels_last: bool | None = None,
    winograd: bool | None = None,
    merge_upsampling: bool | None = None,
    compile: bool = False,
) -> Model:
    """Let a model compute faster, with the same numbers to rounding; it is returned.

    The state dict stays what it is, and gradients are those of the plain modules to rounding. A
    later call sets everything anew, so that
    `accelerate(model, channels_last=False, winograd=False, merge_upsampling=False)` undoes it all.
    None is chosen by the device that the parameters are on; after a move to another, call it again.

    Args:
        model: an AutoEncoderKL, or any module of such parts.
        channels_last: hold feature maps [B, C, H, W] with the channels innermost, as convolutions
            on CPUs and CUDA prefer. On CUDA the weights are stored so as well.
        winograd: compute wide 3 x 3 convolutions and their gradients by `kl_vae.accel.winograd`, on
            CPUs in float32: up to 2 times as fast, with about 5 times the rounding error. Of
            `torch.func` only `grad` can pass them.
        merge_upsampling: compute `Upsample` by `kl_vae.accel.upsample`.
        compile: torch.compile encoder and decoder. That takes about a minute for each size of
            images, and a C++ compiler on CPUs, where Winograd's convolutions are then plain ones.
    """
    device = next(model.parameters()).device.type
    if channels_last is None:
        channels_last = device in ("cpu", "cuda")
    if winograd is None:
        winograd = device == "cpu"
    _set_layout(model, torch.channels_last if channels_last else torch.contiguous_format, device)
    set_algorithms(model, winograd=winograd, merge_upsampling=merge_upsampling)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("encoder", "decoder"):
            if compile:
                module.compile()
            else:
                module._compiled_call_impl = None
    return model


def set_algorithms(model: nn.Module, *, winograd: bool, merge_upsampling: bool | None) -> None:
    """Let the parts of a model compute by these, which it may have no contents for."""
    for module in model.modules():
        if is_3_by_3(module):
            module.__class__ = WinogradConv2d if winograd else nn.Conv2d
        elif type(module) in (ResnetBlock, FusedResnetBlock):
            module.__class__ = FusedResnetBlock if winograd else ResnetBlock
        elif isinstance(module, Upsample):
            module.merges = merge_upsampling


def accelerate_as(mode: str, model: Model, *, compile: bool = False) -> Model:
    """`accelerate` as commands do it: auto; exact, without Winograd; off, all modules plain.

    Raises:
        ValueError: no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"fast={mode!r}: give one of {', '.join(MODES)}")
    if mode == "off":
        off = {"channels_last": False, "winograd": False, "merge_upsampling": False}
        return accelerate(model, **off, compile=compile)
    return accelerate(model, winograd=False if mode == "exact" else None, compile=compile)


def _set_layout(model: nn.Module, layout: torch.memory_format, device: str) -> None:
    for name, module in model.named_modules():
        # a convolution with such a weight gives such a map, and what follows keeps it: on CPUs the
        # first ones suffice, and the other weights, which may be mapped files, stay where they are
        first = name.rpartition(".")[2] == "conv_in"
        if isinstance(module, nn.Conv2d) and (first or device != "cpu"):
            module.to(memory_format=layout)
