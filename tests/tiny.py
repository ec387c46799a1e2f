"""A tiny autoencoder, its files as commands are given them, and one image through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.inference.batches import latent_noise
from kl_vae.inference.coding import reconstruct_batch
from kl_vae.inference.tiling import Tiling


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


DEFAULT_TILING = Tiling()


def reconstruct_image(
    model: AutoEncoderKL,
    image: Tensor,
    precision: str = "fp32",
    generator: torch.Generator | None = None,
    tiling: Tiling = DEFAULT_TILING,
) -> Tensor:
    """Reconstruct one image [C, H, W] in [-1, 1] as `kl_vae.reconstruct` does."""
    noise = None if generator is None else [latent_noise(model, image, generator)]
    (result,) = reconstruct_batch(model, [image], precision, noise, tiling)
    if result.image is None:
        raise ValueError(result.reason)
    return result.image.cpu()
