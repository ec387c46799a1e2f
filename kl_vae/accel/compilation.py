"""torch.compile for the blocks of the autoencoder in training."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from kl_vae.decoder import Decoder
from kl_vae.encoder import Encoder, Level, Middle

logger = logging.getLogger(__name__)

_GRAPHS_PER_BLOCK = 4  # with and without gradients, with static and dynamic sizes
# Norm and SiLU are computed again in each kernel of the backward pass that needs them. By default
# the compiler stores them in float32, and a block moves 1.6 times as many bytes.
_CUDA_OPTIONS = {
    "realize_opcount_threshold": 200,
    "realize_reads_threshold": 32,
    "realize_acc_reads_threshold": 64,
}


def can_compile(device: torch.device, wanted: bool | Literal["auto"]) -> bool:
    """Return whether to compile: `auto` does on CUDA devices, if torch.compile works there.

    A small function is compiled, forward and backward, so that a broken setup is found early.
    Under `auto`, a block that cannot be compiled later runs eagerly, with a warning.

    Raises:
        ValueError: `wanted` is true, and torch.compile does not work on the device.
    """
    if not wanted or (wanted == "auto" and device.type != "cuda"):
        return False
    try:
        x = torch.linspace(0.0, 1.0, 64, device=device).requires_grad_()
        torch.autograd.grad(torch.compile(_small_function)(x).sum(), x)
    except Exception as error:  # backends raise different types
        # the first line is the reason; the rest is debugging advice for compiler developers
        lines = (line.strip() for line in str(error).splitlines())
        reason = next(filter(None, lines), type(error).__name__)
        needs = (
            "a C++ compiler (such as g++)" if device.type == "cpu" else "Triton and a C compiler"
        )
        text = f"torch.compile does not work on {device.type} here ({reason}); install {needs}"
        if wanted != "auto":
            text = f"training.compile=true: {text}, or set training.compile to false"
            raise ValueError(text) from error
        logger.warning("%s; the run continues without it", text)
        return False
    torch._dynamo.config.suppress_errors = wanted == "auto"
    return True


def compile_blocks(model: nn.Module, *, dynamic: bool) -> None:
    """Compile each residual block, attention and last norm in place, on its first call.

    Blocks of the same shapes share their kernels. Parameter names and state dicts do not change.
    The first and last convolutions are not compiled: the adaptive GAN weight needs the gradient of
    the last one's weight alone, and a compiled part has a single backward. The graphs depend only
    on the current shapes, not on earlier ones, so that a resumed run computes the same as an
    uninterrupted one.

    Args:
        model: an AutoEncoderKL, or its encoder or decoder.
        dynamic: compile for dynamic shapes, if shapes vary between steps.
    """
    blocks: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, Level):
            blocks += [*module.block, *module.attn]
        elif isinstance(module, Middle):
            blocks += [module.block_1, module.attn_1, module.block_2]
        elif isinstance(module, (Encoder, Decoder)):
            blocks.append(module.norm_out)
    # all modules share one code cache entry in torch._dynamo, whose size is limited
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _GRAPHS_PER_BLOCK * len(blocks))
    on_cuda = next(model.parameters()).device.type == "cuda"
    for block in blocks:
        block.compile(dynamic=dynamic, options=_CUDA_OPTIONS if on_cuda else None)


def uncompiled(enabled: bool) -> AbstractContextManager[object]:
    """Return a context in which compiled parts run eagerly, without gradients.

    It avoids a compilation for the smaller last batch of a validation. `enabled` is whether the
    model has compiled parts.
    """
    if not enabled:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def _small_function(x: torch.Tensor) -> torch.Tensor:
    return x.sin().square()
