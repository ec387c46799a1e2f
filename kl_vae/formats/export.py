"""Write the autoencoder of a run alone."""

from __future__ import annotations

from pathlib import Path

from kl_vae.formats.checkpoint import model_params_of, write_checkpoint
from kl_vae.formats.run_checkpoints import read_chosen
from kl_vae.formats.weights import state_dict_of


def export_checkpoint(source: Path, out: Path, ema: bool = True) -> str:
    """Write the autoencoder's weights and its config alone.

    Args:
        source: a run directory or one of our checkpoints.
        out: the file to write.
        ema: the moving average of the weights, where there is one.

    Returns:
        What was written, in words.

    Raises:
        ValueError: `source` is no checkpoint of ours, or `out` exists or cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; name a file that does not")
    path, content = read_chosen(source)
    params = model_params_of(content, str(path))
    tensors = {
        key: tensor
        for key, tensor in state_dict_of(content, str(path), ema=ema).items()
        if not key.startswith("loss.")
    }
    averaged = ema and content.get("ema") is not None
    # a loss needs no place in a config whose weights have none
    config = {"model": {"params": {**params, "lossconfig": None, "monitor": None}}}
    try:
        write_checkpoint(out, {"model": tensors, "config": config, "step": content["step"]})
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error}); choose another --out") from None
    kind = "averaged weights" if averaged else "weights"
    return f"{kind} of step {content['step']} ({len(tensors)} tensors)"
