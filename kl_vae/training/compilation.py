"""torch.compile of the parts of the autoencoder that a training step passes through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from kl_vae.model import AutoEncoderKL
from kl_vae.training.config import TrainingConfig

_GRAPHS_OF_A_PART = 4  # with and without gradients, and where sizes change


def check_compiler(device: torch.device) -> None:
    """Compile a line, forward and backward, so that a machine that cannot is told before all else.

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


def compile_parts(model: AutoEncoderKL, training: TrainingConfig) -> None:
    """Have each level and each middle of the model compiled when it is first called.

    In place: names, state dicts and copies of the model know nothing of it. The first and last
    convolutions stay as they are: a GAN asks for the gradient of the last one's weight alone, and a
    compiled part has but one backward. What is compiled depends on the shapes alone, never on those
    that came before, so that a run that goes on computes as if it had never stopped; where a step
    may scale its latents the shapes are left open.
    """
    parts = list(_parts(model))
    # all modules share one entry of torch's table, whose length is limited
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _GRAPHS_OF_A_PART * len(parts))
    for part in parts:
        part.compile(dynamic=training.equivariance > 0)


def uncompiled(training: TrainingConfig) -> AbstractContextManager[object]:
    """Within this, compiled parts run as they were written: batches of any size, without gradients.

    The figures of a validation, whose last batch is smaller, take no compilation then.
    """
    if not training.compile:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def _parts(model: AutoEncoderKL) -> Iterator[nn.Module]:
    for coder, levels in ((model.encoder, model.encoder.down), (model.decoder, model.decoder.up)):
        yield from levels
        yield coder.mid


def _line(x: torch.Tensor) -> torch.Tensor:
    return x.sin().square()
