"""The model that a command was asked to use."""

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

Checkpoint = str | Path | AutoEncoderKL
WAIT_SECONDS = 86_400  # for other ranks: the slowest may have far more to do than the others


@contextmanager
def connect_ranks(checkpoints: Sequence[Checkpoint], device: str) -> Iterator[Ranks]:
    """Join the ranks of a command, as `connect`; a model in place of a checkpoint says the device.

    Raises:
        ValueError, RunError: as `connect`.
    """
    for checkpoint in checkpoints:
        if isinstance(checkpoint, AutoEncoderKL):
            device = str(checkpoint.device)
    with connect(device, WAIT_SECONDS, COMMAND) as ranks:
        yield ranks


def load_model_on(
    ranks: Ranks,
    checkpoint: Checkpoint,
    config: str | None,
    ema: bool = True,
    fast: str = "auto",
    compile: bool = False,
) -> AutoEncoderKL:
    """Load a model on each rank's device; all ranks call this.

    A model that is given in place of a checkpoint is put into eval mode and stays where it is.

    Raises:
        ValueError: as `load_model`, or the ranks have read different weights.
    """
    if isinstance(checkpoint, AutoEncoderKL):
        return checkpoint.eval()
    model = load_model(str(checkpoint), config, ranks.device, ema, fast, compile)
    found = model_fingerprint(model)
    if ranks.on_rank_zero(lambda: found) != found:
        raise ValueError(
            f"{checkpoint}: rank {ranks.rank} has read other weights than rank 0, since its run "
            "continues; give one file of its checkpoints"
        )
    return model


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint, or a model in place of one, is called in results."""
    if isinstance(checkpoint, AutoEncoderKL):
        return "a model in memory"
    return display_name(checkpoint)


def model_fingerprint(model: AutoEncoderKL) -> str:
    """32 hex digits that change when the architecture or the weights do."""
    text = json.dumps([model.params, checksums(model)], sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def load_model(
    checkpoint: str,
    config: str | None,
    device: torch.device,
    ema: bool = True,
    fast: str = "auto",
    compile: bool = False,
) -> AutoEncoderKL:
    """Load a checkpoint in eval mode, to encode and decode without a context.

    Args:
        checkpoint: what `AutoEncoderKL.from_checkpoint` takes.
        config: a config file, or a shipped config's name; None: as the checkpoint says or shows.
        device: where the model goes.
        ema: the moving average of the weights, where the checkpoint has one.
        fast: auto, exact or off: which fast variants are used; see `accelerate_as`.
        compile: torch.compile encoder and decoder.

    Raises:
        ValueError: the checkpoint cannot be loaded, the model needs a context, or no such `fast`.
    """
    model = read_model(checkpoint, config, ema)
    if model.config.context_channels:
        raise ValueError(
            f"{checkpoint}: this model needs a context (context_channels="
            f"{model.config.context_channels}), which no command gives; call it from Python"
        )
    return accelerate_as(fast, model.to(device), compile=compile)


def read_model(checkpoint: str, config: str | None, ema: bool = True) -> AutoEncoderKL:
    """Load a checkpoint in eval mode, on the CPU; the arguments are those of `load_model`."""
    params = None
    if config is not None:
        from kl_vae.runtime.config_file import load_model_params

        params = load_model_params(config)
    return AutoEncoderKL.from_checkpoint(checkpoint, params, ema=ema)
