"""torch.compile of the parts of the autoencoder that a training step passes through."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from kl_vae.encoder import Level, Middle

_GRAPHS_OF_A_PART = 4  # with and without gradients, and where sizes change


def check_compiler(device: torch.device) -> None:
    """Compile one line, forward and backward, so that what cannot work fails before all else.

    Raises:
        ValueError: why it cannot, and what to install.
    """
    needs = "a C++ compiler (such as g++)" if device.type == "cpu" else "Triton (and a C compiler)"
    try:
        x = torch.linspace(0.0, 1.0, 64, device=device).requires_grad_()
        torch.autograd.grad(torch.compile(_line)(x).sum(), x)
    except Exception as error:  # each backend has errors of its own
        # the first line is the reason; the rest is advice to those who develop the compiler
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(
            f"training.compile=true: torch.compile does not work on {device.type} here "
            f"({reason or type(error).__name__}); install {needs}, or set training.compile to false"
        ) from error


def compile_parts(model: nn.Module, *, dynamic: bool) -> None:
    """Have each level and each middle of the model compiled when it is first called.

    In place: names, state dicts and copies of the model know nothing of it. The first and last
    convolutions stay as they are: a GAN asks for the gradient of the last one's weight alone, and a
    compiled part has but one backward. What is compiled depends on the shapes alone, never on those
    that came before, so that a resumed run computes as if it had never stopped.

    Args:
        model: an AutoEncoderKL, or its encoder or decoder.
        dynamic: leave the shapes open, where each step may have others.
    """
    parts = [module for module in model.modules() if isinstance(module, (Level, Middle))]
    # all modules share one entry of torch's table, whose length is limited
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _GRAPHS_OF_A_PART * len(parts))
    for part in parts:
        part.compile(dynamic=dynamic)


def uncompiled(enabled: bool) -> AbstractContextManager[object]:
    """Within this, compiled parts run as they were written: batches of any size, without gradients.

    So the last, smaller batch of a validation takes no compilation. `enabled`: whether there are
    compiled parts at all.
    """
    if not enabled:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def _line(x: torch.Tensor) -> torch.Tensor:
    return x.sin().square()
