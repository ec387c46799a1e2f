"""Which algorithms of `kl_vae.accel` a model computes by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from kl_vae.accel.checkpointing import ACTIVATION_CHECKPOINTING
from kl_vae.accel.coder import FastDecoder, FastEncoder
from kl_vae.accel.convolution import CONVOLUTIONS, WinogradConv2d, is_3_by_3
from kl_vae.accel.group_norm import FLOAT32_NORMS, ChannelsLastGroupNorm
from kl_vae.accel.resnet_block import FastResnetBlock
from kl_vae.accel.upsample import MergedUpsample
from kl_vae.blocks import GroupNorm, ResnetBlock, Upsample
from kl_vae.decoder import Decoder
from kl_vae.encoder import Encoder

Model = TypeVar("Model", bound=nn.Module)

MODES = ("auto", "exact", "off")

_FAST: dict[type[nn.Module], type[nn.Module]] = {
    ResnetBlock: FastResnetBlock,
    Encoder: FastEncoder,
    Decoder: FastDecoder,
}
_PLAIN = {fast: plain for plain, fast in _FAST.items()}


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
    Activation checkpointing stays as `set_activation_checkpointing` has it.

    The classes of modules are swapped for ones that compute the same otherwise; each runs the plain
    code where something is not as it expects (`kl_vae.accel.swap`).

    Args:
        model: an AutoEncoderKL, or any module of such parts.
        channels_last: hold feature maps [B, C, H, W] with the channels innermost, as convolutions
            on CPUs and CUDA prefer. On CUDA the weights are stored so as well.
        winograd: compute wide 3 x 3 convolutions and their gradients by `kl_vae.accel.winograd`, on
            CPUs in float32: up to 2 times as fast, with about 5 times the rounding error.
        merge_upsampling: compute `Upsample` by `kl_vae.accel.upsample`; None: where it is faster.
        compile: torch.compile encoder and decoder. That takes about a minute for each size of
            images, and a C++ compiler on CPUs, where Winograd's convolutions are then plain ones.
    """
    device = next(model.parameters()).device.type
    if channels_last is None:
        channels_last = device in ("cpu", "cuda")
    if winograd is None:
        winograd = device == "cpu"
    _set_layout(model, torch.channels_last if channels_last else torch.contiguous_format, device)
    set_algorithms(
        model,
        winograd=winograd,
        merge_upsampling=merge_upsampling,
        channels_last=channels_last,
    )
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("encoder", "decoder"):
            if compile:
                module.compile()
            else:
                module._compiled_call_impl = None
    return model


def set_algorithms(
    model: nn.Module,
    *,
    winograd: bool,
    merge_upsampling: bool | None,
    channels_last: bool = False,
) -> None:
    """Swap the classes of a model's modules, which may be without contents.

    Where nothing is asked for, all are plain again, but for what activation checkpointing needs.
    """
    plain = not (channels_last or winograd) and merge_upsampling is False
    for module in model.modules():
        if type(module) in (Upsample, MergedUpsample):
            module.__class__ = Upsample if merge_upsampling is False else MergedUpsample
            if isinstance(module, MergedUpsample):
                module.always = merge_upsampling is True
        elif type(module) in CONVOLUTIONS and (not winograd or is_3_by_3(cast(nn.Conv2d, module))):
            module.__class__ = WinogradConv2d if winograd else nn.Conv2d
        elif type(module) in FLOAT32_NORMS:
            module.__class__ = GroupNorm if plain else ChannelsLastGroupNorm
        elif getattr(module, "activation_checkpointing", None) is None:
            _swap(module, _PLAIN if plain else _FAST)


def set_activation_checkpointing(model: nn.Module, kind: str | None) -> None:
    """Choose what the backward pass computes again instead of keeping it (Chen et al. 2016).

    Gradients stay the same. A block of your own is told by its attribute
    `activation_checkpointing`, where it has one.

    Args:
        model: an AutoEncoderKL, its encoder or its decoder.
        kind: none: nothing but what lies between a norm and its SiLU; norms: what lies between a
            norm and its convolution; blocks: the residual blocks; None: as before any call, all
            that autograd wants is kept.

    Raises:
        ValueError: no such kind.
    """
    if kind is not None and kind not in ACTIVATION_CHECKPOINTING:
        raise ValueError(
            f"activation_checkpointing={kind!r}: choose one of "
            f"{', '.join(ACTIVATION_CHECKPOINTING)}"
        )
    coders = [module for module in model.modules() if isinstance(module, (Encoder, Decoder))]
    for module in (inner for coder in coders for inner in coder.modules()):
        if kind is not None:
            _swap(module, _FAST)
        if hasattr(module, "activation_checkpointing"):
            setattr(module, "activation_checkpointing", kind)  # noqa: B010 - for mypy


def _swap(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    module.__class__ = classes.get(type(module), type(module))


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
