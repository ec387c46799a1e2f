"""What a folder of latents was made from, and whether one may go on with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from kl_vae.data import ImageDataset
from kl_vae.data.latent_index import INDEX, LatentIndex, LatentSettings, read_index
from kl_vae.inference.encoding.labels import Labels
from kl_vae.inference.encoding.stored_latents import EncodeConfig
from kl_vae.inference.progress import FOLDER, differences
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.files import display_name, remove_temporaries


def shard_name(unit: int, number: int) -> str:
    """The file of one of `number` shards."""
    return f"latents-{unit:05d}-of-{number:05d}.safetensors"


def settings_of(
    model: AutoEncoderKL, dataset: ImageDataset, config: EncodeConfig, labels: Labels | None
) -> LatentSettings:
    """All that the latents of a data set depend on, but for how many are encoded at once.

    Batches of another size, and another device, round the last bits otherwise.
    """
    return LatentSettings(
        what=config.what,
        dtype=config.dtype,
        normalized=config.normalize,
        flipped=config.flip,
        f=model.downsampling_factor,
        channels=model.latent_channels,
        crop=dataset.crop,
        resize=dataset.resize or dataset.crop,
        precision=config.precision,
        seed=config.seed if config.what == "sample" else None,
        images=len(dataset),
        shard_size=config.shard_size,
        labels=None if labels is None else labels.checksum,
        source=dataset.fingerprint,
        weights=weights_sha256(model),
        normalization=None if model.latents is None else dataclasses.asdict(model.latents),
    )


def weights_sha256(model: AutoEncoderKL) -> str:
    """64 hex digits of the names, shapes and bits of a model's tensors, without its loss."""
    digest = hashlib.sha256()
    for key, x in sorted(model.without_loss().state_dict().items()):
        digest.update(f"{key} {x.dtype} {list(x.shape)}\n".encode())
        # as bytes: NumPy has no bf16
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_folder(out: Path, settings: LatentSettings, resume: bool) -> LatentIndex | None:
    """Check that latents may be written to `out`, and clear away what a killed process left.

    Returns:
        The index of a folder that was complete before.

    Raises:
        ValueError: it holds other latents, or complete ones without `resume`.
    """
    name = display_name(out)
    if not (out / INDEX).exists():
        begun = (out / FOLDER).exists()
        stray = sorted(out.glob("latents-*-of-*.safetensors"))
        if stray and not begun:
            raise ValueError(
                f"{name}: holds {display_name(stray[0].name)} and no {INDEX}; remove what there is "
                "of latents, or give another --out"
            )
        if begun and resume:
            remove_temporaries(out)
        return None
    if not resume:
        raise ValueError(
            f"{name}: holds latents already; give --resume to verify and mend them, or another "
            "--out"
        )
    index = read_index(out)
    changed = differences(_plain(index.settings), _plain(settings))
    if changed:
        raise ValueError(
            f"{name}: holds other latents ({changed}); give the same again to verify them, or "
            "another --out"
        )
    remove_temporaries(out)
    return index


def _plain(settings: LatentSettings) -> dict[str, Any]:
    """As it is read from JSON, where tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return plain
