"""The images that a training run draws at each validation."""

from __future__ import annotations

import logging
from itertools import islice

import torch
from torch import Tensor

from kl_vae.data import ImageDataset, normalized
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.randomness import normal_noise
from kl_vae.visual.grid import comparison_grid, image_grid
from kl_vae.visual.image_files import as_saved, for_display

logger = logging.getLogger(__name__)

COLUMNS = 4


@torch.inference_mode()
def draw_validation_images(
    model: AutoEncoderKL, val_set: ImageDataset, number: int
) -> dict[str, Tensor]:
    """Return image grids [3, H, W], uint8, by name.

    `reconstructions`: the first `number` images of the validation set, one per row as input |
    reconstruction of the mode | difference. `prior`: decoded samples of N(0, I), of the same
    latents at each validation; left out if they are not finite.
    """
    device = model.get_last_layer().device
    training = model.training
    model.eval()

    def to_rgb(image: Tensor) -> Tensor:
        return for_display(
            as_saved(image.float().cpu()), lambda x: model.to_rgb(x.to(device)).cpu()
        )

    samples = (val_set[0, i, i] for i in range(len(val_set)))
    usable = islice((sample for sample in samples if sample.name), number)
    images = [normalized(sample.image.contiguous()) for sample in usable]
    reconstructions = [model(x[None].to(device), sample_posterior=False)[0][0] for x in images]
    grids = {
        "reconstructions": comparison_grid(
            [to_rgb(image) for image in images], [to_rgb(image) for image in reconstructions]
        )
    }
    height, width = (side // model.downsampling_factor for side in val_set.crop_size)
    shape = (model.latent_channels, height, width)
    latents = (normal_noise(shape, "sample", 0, i) for i in range(number))
    prior = [model.decode(z[None].to(device))[0].float().cpu() for z in latents]
    if all(image.isfinite().all() for image in prior):
        grids["prior"] = image_grid([to_rgb(image.clamp(-1.0, 1.0)) for image in prior], COLUMNS)
    else:  # far from the posterior a decoder may do anything
        logger.warning("no image of the prior: a decoded sample of N(0, I) has NaN or infinity")
    model.train(training)
    return grids
