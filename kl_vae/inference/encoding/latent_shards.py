"""Encode a data set shard by shard, each a function of its own images alone.

B batch, n images of a shard, z latent channels, h and w the latents' height and width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from kl_vae.data import BadImage, Batch, ImageDataset, Key, batch_loader
from kl_vae.data.latent_index import LatentSettings, ShardEntry, SkippedImage
from kl_vae.data.latent_shard import DTYPES, KEYS
from kl_vae.inference.coding import encode_images
from kl_vae.inference.encoding.labels import Labels
from kl_vae.inference.encoding.stored_latents import EncodeConfig, stored_latents
from kl_vae.inference.statistics import LatentSums
from kl_vae.inference.tiling import Tiling
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.files import display_name, write_atomically

_WHOLE = Tiling("whole")  # the last bits of the others depend on the memory that is free

# told of each batch: how many images were read, and which of them could not be used
OnBatch = Callable[[int, Sequence[BadImage]], object]


@dataclass
class Shard:
    """The images of a unit, as they are encoded."""

    sums: LatentSums
    latents: list[Tensor] = field(default_factory=list)  # [B, z or 2z, h, w] each
    flipped: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # in the source
    bad: list[BadImage] = field(default_factory=list)


class _Batches(Sampler[list[Key]]):
    """The batches of some units; none has images of two."""

    def __init__(self, units: Sequence[range], batch_size: int) -> None:
        self._units = units
        self._size = batch_size

    def __len__(self) -> int:
        return sum(number_batches(unit, self._size) for unit in self._units)

    def __iter__(self) -> Iterator[list[Key]]:
        for unit in self._units:
            for start in range(0, len(unit), self._size):
                yield [(0, i, i) for i in unit[start : start + self._size]]


def number_batches(unit: range, batch_size: int) -> int:
    """How many batches a unit is encoded in."""
    return -(-len(unit) // batch_size)


def encode_units(
    model: AutoEncoderKL,
    dataset: ImageDataset,
    units: Sequence[range],
    config: EncodeConfig,
    on_batch: OnBatch,
) -> Iterator[Shard]:
    """Encode ranges of a data set's images, in their order.

    Images are decoded ahead, also those of the next units.

    Raises:
        ValueError: as `encode_images` and `stored_latents`.
    """
    if not units:
        return
    pin_memory = next(model.parameters()).device.type == "cuda"
    batches = _Batches(units, config.batch_size)
    # a slow disk is waited for
    loader = iter(batch_loader(dataset, batches, config.num_workers, pin_memory, timeout_seconds=0))
    for unit in units:
        shard = Shard(LatentSums.of_nothing(model.latent_channels))
        for _ in range(number_batches(unit, config.batch_size)):
            batch: Batch = next(loader)
            shard.bad += batch.bad
            usable = batch.usable()
            if usable.names:
                _add(shard, model, dataset, usable, config)
            on_batch(len(batch.names), batch.bad)
        yield shard


@torch.inference_mode()
def _add(
    shard: Shard, model: AutoEncoderKL, dataset: ImageDataset, batch: Batch, config: EncodeConfig
) -> None:
    positions = batch.positions.tolist()
    keys = [dataset.source.key(i) for i in positions]
    views = {"latents": batch.images}
    if config.flip:
        views["flipped"] = batch.images.flip(3)
    for view, images in views.items():
        posterior = encode_images(model, images, config.precision, _WHOLE, batch.names)
        kept = stored_latents(model, posterior, config, keys, batch.names, view)
        if view == "latents":
            shard.latents.append(kept)
            shard.sums = shard.sums.merge(LatentSums.of(posterior))
        else:
            shard.flipped.append(kept)
    shard.positions += positions


def write_shard(
    path: Path, shard: Shard, settings: LatentSettings, dataset: ImageDataset, labels: Labels | None
) -> ShardEntry:
    """Write a shard's file, and return what the index says of it.

    Raises:
        ValueError: it cannot be written.
    """
    # of no images, too, a tensor of [0, z, h, w]
    nothing = torch.empty(0, *settings.shape, dtype=DTYPES[settings.dtype])
    tensors = {"latents": torch.cat([nothing, *shard.latents])}
    if settings.flipped:
        tensors["flipped"] = torch.cat([nothing, *shard.flipped])
    if labels is not None:
        tensors["labels"] = labels.values[shard.positions]
    # one entry: of several, the library's order differs from run to run
    keys = json.dumps([dataset.source.key(i) for i in shard.positions])
    content = safetensors_bytes(tensors, {KEYS: keys})
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise ValueError(
            f"cannot write {display_name(path)} ({error.strerror}); make room and permission for "
            "it, and go on with --resume"
        ) from error
    return ShardEntry(
        file=path.name,
        number=len(shard.positions),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        skipped=tuple(SkippedImage(*image) for image in shard.bad),
        values=shard.sums.values,
        mean=shard.sums.mean,
        squares=shard.sums.squares,
    )
