"""The statistics of a data set's latents, where the latents themselves are not kept."""

from __future__ import annotations

import torch

from kl_vae.data import ImageDataset, batch_loader, validation_batches
from kl_vae.inference import statistics
from kl_vae.inference.encoding.latent_shards import OnBatch
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.distributed import Ranks


def measure_latents(
    model: AutoEncoderKL,
    dataset: ImageDataset,
    ranks: Ranks,
    on_batch: OnBatch,
    batch_size: int = 8,
    num_workers: int = 4,
    precision: str = "fp32",
) -> tuple[statistics.LatentSums, int]:
    """The sums over the images of all ranks, each once, and how many were skipped.

    `on_batch` is told of the images that all ranks have read, and of this rank's bad ones.

    Raises:
        ValueError: moments are not finite, the memory does not suffice, or no image can be used.
    """
    sums, skipped = statistics.LatentSums.of_nothing(model.latent_channels), 0
    keys = validation_batches(len(dataset), batch_size, ranks.rank, ranks.world_size)
    pin_memory = ranks.device.type == "cuda"
    # a slow disk is waited for
    share = iter(batch_loader(dataset, keys, num_workers, pin_memory, timeout_seconds=0))
    while True:
        batch = next(share, None)
        # all ranks together: one has a batch more than another, and none outruns a failed one
        read = int(ranks.sum(torch.tensor(0 if batch is None else len(batch.names))))
        if not read:
            break
        on_batch(read, () if batch is None else batch.bad)
        if batch is not None:
            skipped += len(batch.bad)
            batch = batch.usable()
            if batch.names:
                sums = sums.merge(statistics.latent_sums(model, batch, precision))
    of_ranks = ranks.gather((sums, skipped))
    total = statistics.LatentSums.of_nothing(model.latent_channels)
    for of_rank, _ in of_ranks:
        total = total.merge(of_rank)
    skipped = sum(number for _, number in of_ranks)
    if not total.images:
        raise ValueError(
            f"none of the {skipped} images can be used, for the reasons above; "
            "give others to --images"
        )
    return total, skipped
