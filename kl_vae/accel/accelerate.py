"""Selection of the `kl_vae.accel` algorithms that a model uses."""

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
    """Speed up a model in place, and return it; results change only by rounding.

    The state dict does not change, and gradients change only by rounding. Each call replaces all
    earlier settings, so that
    `accelerate(model, channels_last=False, winograd=False, merge_upsampling=False)` restores the
    plain modules. Arguments of None are chosen for the device of the parameters; call this again
    after moving the model to another device. Activation checkpointing is not changed, see
    `set_activation_checkpointing`.

    The classes of modules are swapped for equivalent ones, which fall back to the plain code
    whenever their requirements are not met (see `kl_vae.accel.swap`).

    Args:
        model: an AutoEncoderKL, or any module with such submodules.
        channels_last: use the channels_last memory format for feature maps [B, C, H, W], which is
            faster for convolutions on CPUs and CUDA. On CUDA, weights use this format as well.
        winograd: compute wide 3 x 3 convolutions and their gradients by `kl_vae.accel.winograd`, on
            CPUs in float32: up to 2 times as fast, with about 5 times the rounding error.
        merge_upsampling: compute `Upsample` by `kl_vae.accel.upsample`; None: where it is faster.
        compile: apply `torch.compile` to encoder and decoder. Compilation takes about a minute for
            each image size and, on CPUs, needs a C++ compiler and disables Winograd convolutions.
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
    """Swap the classes of a model's modules, which may be on the meta device.

    If no algorithm is selected, all modules are plain again, except where activation checkpointing
    needs a fast class.
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
    """Set which activations the backward pass recomputes instead of storing (Chen et al. 2016).

    Gradients do not change. Custom blocks are configured through their attribute
    `activation_checkpointing`, if they have one.

    Args:
        model: an AutoEncoderKL, its encoder or its decoder.
        kind: none: only the activations between a norm and its SiLU; norms: those between a norm
            and its convolution; blocks: whole residual blocks; None: the initial state, in which
            autograd stores all activations.

    Raises:
        ValueError: the kind is unknown.
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
    """Call `accelerate` for a mode: auto; exact, without Winograd; or off, with plain modules.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"fast={mode!r}: give one of {', '.join(MODES)}")
    if mode == "off":
        off = {"channels_last": False, "winograd": False, "merge_upsampling": False}
        return accelerate(model, **off, compile=compile)
    return accelerate(model, winograd=False if mode == "exact" else None, compile=compile)


def _set_layout(model: nn.Module, layout: torch.memory_format, device: str) -> None:
    for name, module in model.named_modules():
        # the weight's memory format determines that of the output, and later layers keep it: on
        # CPUs converting the first convolution suffices, and weights may stay memory-mapped
        first = name.rpartition(".")[2] == "conv_in"
        if isinstance(module, nn.Conv2d) and (first or device != "cpu"):
            module.to(memory_format=layout)
