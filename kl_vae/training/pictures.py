"""The pictures that a run draws at each validation."""

from __future__ import annotations

import logging
from itertools import islice

import torch
from torch import Tensor

from kl_vae.data import ImageDataset, normalized
from kl_vae.inference.sampled_images import sample_prior
from kl_vae.model import AutoEncoderKL
from kl_vae.training.figures import evaluating
from kl_vae.visual.grid import comparison_grid, image_grid
from kl_vae.visual.image_files import as_picture, as_saved

logger = logging.getLogger(__name__)

COLUMNS = 4


@torch.inference_mode()
def draw_pictures(model: AutoEncoderKL, val_set: ImageDataset, number: int) -> dict[str, Tensor]:
    """Return pictures [3, H, W] uint8 by name.

    `reconstructions`: the first images of the validation set, as input | reconstruction of the mode
    | difference. `prior`: decodes of N(0, I), of the same latents each time; left out where they
    are not finite.
    """
    device = model.get_last_layer().device

    def picture(image: Tensor) -> Tensor:
        return as_picture(as_saved(image.float().cpu()), lambda x: model.to_rgb(x.to(device)).cpu())

    with evaluating(model):
        samples = (val_set[0, i, i] for i in range(len(val_set)))
        usable = islice((sample for sample in samples if sample.name), number)
        images = [normalized(sample.image.contiguous()) for sample in usable]
        reconstructions = [model(x[None].to(device), sample_posterior=False)[0][0] for x in images]
        pictures = {
            "reconstructions": comparison_grid(
                [picture(x) for x in images], [picture(x) for x in reconstructions]
            )
        }
        try:
            prior = list(sample_prior(model, number, val_set.crop, batch_size=1))
        except ValueError as error:  # far from the posterior a decoder may do anything
            logger.warning("no picture of the prior: %s", error)
            return pictures
    return {**pictures, "prior": image_grid([picture(x) for x in prior], COLUMNS)}
