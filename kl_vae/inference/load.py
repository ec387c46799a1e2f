"""The model that a command was asked to use."""

import torch

from kl_vae.model import AutoEncoderKL


def load_model(
    checkpoint: str, config: str | None, device: torch.device, ema: bool = True
) -> AutoEncoderKL:
    """Load a checkpoint in eval mode, to encode and decode without a context.

    Args:
        checkpoint: what `AutoEncoderKL.from_checkpoint` takes.
        config: a config file, or a shipped config's name; None: as the checkpoint says or shows.
        device: where the model goes.
        ema: the moving average of the weights, where the checkpoint has one.

    Raises:
        ValueError: the checkpoint cannot be loaded, or the model needs a context.
    """
    model = read_model(checkpoint, config, ema)
    if model.config.context_channels:
        raise ValueError(
            f"{checkpoint}: this model needs a context (context_channels="
            f"{model.config.context_channels}), which no command gives; call it from Python"
        )
    return model.to(device)


def read_model(checkpoint: str, config: str | None, ema: bool = True) -> AutoEncoderKL:
    """Load a checkpoint in eval mode, on the CPU; the arguments are those of `load_model`."""
    params = None
    if config is not None:
        from kl_vae.config import load_model_params

        params = load_model_params(config)
    return AutoEncoderKL.from_checkpoint(checkpoint, params, ema=ema)
