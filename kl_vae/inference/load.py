"""Loading of the model for a command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import torch

from kl_vae.accel.accelerate import accelerate_as
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.distributed import COMMAND, Ranks, checksums, connect
from kl_vae.runtime.files import display_name
from kl_vae.runtime.published_config import ConfigSource

Checkpoint = str | Path | AutoEncoderKL
WAIT_SECONDS = 86_400  # timeout for other ranks, whose shares of the work may take far longer


@contextmanager
def connect_ranks(checkpoints: Sequence[Checkpoint], device: str) -> Iterator[Ranks]:
    """Connect the ranks of a command.

    A model given in place of a checkpoint determines the device.

    Raises:
        ValueError, RunError: see `connect`.
    """
    for checkpoint in checkpoints:
        if isinstance(checkpoint, AutoEncoderKL):
            device = str(checkpoint.device)
    with connect(device, WAIT_SECONDS, COMMAND) as ranks:
        yield ranks


def load_model_on(
    ranks: Ranks,
    checkpoint: Checkpoint,
    config: ConfigSource | None,
    ema: bool = True,
    fast: str = "auto",
    compile: bool = False,
) -> AutoEncoderKL:
    """Load a model on the device of each rank; all ranks must call this.

    A model given in place of a checkpoint is switched to eval mode and stays on its device.

    Raises:
        ValueError: see `load_model`; or the ranks read different weights.
    """
    if isinstance(checkpoint, AutoEncoderKL):
        return checkpoint.eval()
    model = load_model(str(checkpoint), config, ranks.device, ema, fast, compile)
    found = model_fingerprint(model)
    if ranks.on_rank_zero(lambda: found) != found:
        raise ValueError(
            f"{checkpoint}: rank {ranks.rank} read different weights than rank 0, because the run "
            "is still training; give one checkpoint file of the run"
        )
    return model


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """Return the display name of a checkpoint or model."""
    if isinstance(checkpoint, AutoEncoderKL):
        return "a model in memory"
    return display_name(checkpoint)


def model_fingerprint(model: AutoEncoderKL) -> str:
    """Return a hash of architecture and weights, 32 hex digits."""
    text = json.dumps([model.params, checksums(model)], sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def load_model(
    checkpoint: str,
    config: ConfigSource | None,
    device: torch.device,
    ema: bool = True,
    fast: str = "auto",
    compile: bool = False,
) -> AutoEncoderKL:
    """Load a checkpoint in eval mode, for encoding and decoding without a context.

    Args:
        checkpoint: a checkpoint accepted by `AutoEncoderKL.from_checkpoint`.
        config: a config (a file, a shipped name, or keys); None: read or inferred from the
            checkpoint.
        device: target device.
        ema: load the EMA weights if the checkpoint has them.
        fast: auto, exact or off; see `accelerate_as`.
        compile: apply `torch.compile` to encoder and decoder.

    Raises:
        ValueError: the checkpoint cannot be loaded, the model needs a context, or `fast` is
            unknown.
    """
    model = read_model(checkpoint, config, ema)
    if model.config.context_channels:
        raise ValueError(
            f"{checkpoint}: this model needs a context (context_channels="
            f"{model.config.context_channels}), which commands do not support; use it from Python"
        )
    return accelerate_as(fast, model.to(device), compile=compile)


def read_model(checkpoint: str, config: ConfigSource | None, ema: bool = True) -> AutoEncoderKL:
    """Load a checkpoint in eval mode on the CPU; see `load_model` for the arguments."""
    params = None
    if config is not None:
        from kl_vae.runtime.config_file import load_model_params

        params = load_model_params(config)
    return AutoEncoderKL.from_checkpoint(checkpoint, params, ema=ema)
