"""diffusers' AutoencoderKL of the same architecture, with the same weights."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import Any

from kl_vae.checkpoints.diffusers import config_of_params, inexpressible, to_diffusers
from kl_vae.ddconfig import DDConfig
from kl_vae.model import AutoEncoderKL


def why_no_twin(ddconfig: DDConfig, embed_dim: int | None) -> str | None:
    """One line that says why there is nothing to compare with; None: there is."""
    if find_spec("diffusers") is None:
        return "Ours alone: diffusers is not installed (pip install diffusers)."
    reasons = inexpressible(_params(ddconfig, embed_dim))
    if reasons:
        return f"Ours alone: diffusers cannot express this model: {'; '.join(reasons)}."
    return None


def build_twin(ddconfig: DDConfig, embed_dim: int | None) -> Any:
    """The module of diffusers of an architecture, with random weights, in eval mode on the CPU.

    Raises:
        ValueError: diffusers cannot express it.
    """
    config = config_of_params(_params(ddconfig, embed_dim))
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{k: x for k, x in config.items() if not k.startswith("_")}).eval()


def twin_of(model: AutoEncoderKL) -> Any:
    """The module of diffusers with the weights of ours, on its device.

    Raises:
        ValueError: diffusers cannot express it.
    """
    twin = build_twin(model.config, model.embed_dim)
    own = model.without_loss().state_dict()
    twin.load_state_dict(to_diffusers({k: x for k, x in own.items() if k != "colorize"}))
    return twin.to(model.get_last_layer().device)


def _params(ddconfig: DDConfig, embed_dim: int | None) -> dict[str, Any]:
    return {"ddconfig": dataclasses.asdict(ddconfig), "embed_dim": embed_dim}
