"""A tiny autoencoder, and its files as commands are given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from kl_vae import AutoEncoderKL


def tiny_ddconfig(**changes: Any) -> dict[str, Any]:
    """An architecture without attention in its levels, f = 2, with some keys changed."""
    ddconfig: dict[str, Any] = {
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "in_channels": 3,
        "out_ch": 3,
        "resolution": 16,
        "z_channels": 2,
    }
    return {**ddconfig, **changes}


def tiny_model(embed_dim: int | None = 2, **changes: Any) -> AutoEncoderKL:
    """A model in eval mode, whose weights are always the same."""
    torch.manual_seed(0)
    return AutoEncoderKL(tiny_ddconfig(**changes), embed_dim).eval()


def save_tiny_model(folder: Path, embed_dim: int | None = 2, **changes: Any) -> list[str]:
    """Save a tiny model's weights and config; return the arguments that name them."""
    torch.save(tiny_model(embed_dim, **changes).state_dict(), folder / "model.pt")
    params = {"ddconfig": tiny_ddconfig(**changes), "embed_dim": embed_dim}
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    return ["--checkpoint", str(folder / "model.pt"), "--config", str(folder / "model.yaml")]
