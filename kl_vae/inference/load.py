"""The model that a command was asked to use."""

import torch

from kl_vae.model import AutoEncoderKL


def load_model(
    checkpoint: str, config: str | None, device: torch.device, ema: bool = True
) -> AutoEncoderKL:
    """Load a checkpoint in eval mode.

    Args:
        checkpoint: a run directory, one of our checkpoints, or with `config` any state dict.
        config: a config file, or a shipped config's name; None: as the checkpoint says.
        device: where the model goes.
        ema: the moving average of the weights, where the checkpoint has one.

    Raises:
        ValueError: the checkpoint cannot be loaded, or the model needs a context.
    """
    params = None
    if config is not None:
        from kl_vae.config import load_model_params

        params = load_model_params(config)
    model = AutoEncoderKL.from_checkpoint(checkpoint, params, ema=ema)
    if model.config.context_channels:
        raise ValueError(
            f"{checkpoint}: this model needs a context (context_channels="
            f"{model.config.context_channels}), which no command gives; call it from Python"
        )
    return model.to(device)
