"""torch.compile for the levels of the autoencoder in training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from kl_vae.encoder import Level, Middle

_GRAPHS_PER_PART = 4  # with and without gradients, with static and dynamic sizes


def check_compiler(device: torch.device) -> None:
    """Compile a small function, forward and backward, so that a broken setup fails early.

    Raises:
        ValueError: torch.compile does not work on the device.
    """
    needs = "a C++ compiler (such as g++)" if device.type == "cpu" else "Triton (and a C compiler)"
    try:
        x = torch.linspace(0.0, 1.0, 64, device=device).requires_grad_()
        torch.autograd.grad(torch.compile(_small_function)(x).sum(), x)
    except Exception as error:  # backends raise different types
        # the first line is the reason; the rest is debugging advice for compiler developers
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(
            f"training.compile=true: torch.compile does not work on {device.type} here "
            f"({reason or type(error).__name__}); install {needs}, or set training.compile to false"
        ) from error


def compile_parts(model: nn.Module, *, dynamic: bool) -> None:
    """Compile each level and middle part of the model in place, on its first call.

    Parameter names and state dicts do not change. The first and last convolutions are not
    compiled: the adaptive GAN weight needs the gradient of the last one's weight alone, and a
    compiled part has a single backward. The graphs depend only on the current shapes, not on
    earlier ones, so that a resumed run computes the same as an uninterrupted one.

    Args:
        model: an AutoEncoderKL, or its encoder or decoder.
        dynamic: compile for dynamic shapes, if shapes vary between steps.
    """
    parts = [module for module in model.modules() if isinstance(module, (Level, Middle))]
    # all modules share one code cache entry in torch._dynamo, whose size is limited
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _GRAPHS_PER_PART * len(parts))
    for part in parts:
        part.compile(dynamic=dynamic)


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
