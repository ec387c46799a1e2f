"""The pictures that a run draws at each validation."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_vae.data import ImageDataset
from kl_vae.inference.grid import comparison_grid, image_grid
from kl_vae.inference.picture_files import as_picture, as_saved
from kl_vae.inference.sample import sample_prior
from kl_vae.model import AutoEncoderKL
from kl_vae.training.figures import evaluating

COLUMNS = 4


@torch.inference_mode()
def draw_pictures(model: AutoEncoderKL, val_set: ImageDataset, number: int) -> dict[str, Tensor]:
    """Return pictures [3, H, W] uint8 by name.

    `reconstructions`: the first images of the validation set, as input | reconstruction of the mode
    | difference. `prior`: decodes of N(0, I), of the same latents each time.
    """
    device = model.get_last_layer().device

    def picture(image: Tensor) -> Tensor:
        return as_picture(as_saved(image.float().cpu()), lambda x: model.to_rgb(x.to(device)).cpu())

    with evaluating(model):
        images = [val_set[0, i, i].image for i in range(min(number, len(val_set)))]
        reconstructions = [model(x[None].to(device), sample_posterior=False)[0][0] for x in images]
        prior = list(sample_prior(model, number, val_set.crop, batch_size=1))
    pictures = {
        "reconstructions": comparison_grid(
            [picture(x) for x in images], [picture(x) for x in reconstructions]
        ),
        "prior": image_grid([picture(x) for x in prior], COLUMNS),
    }
    return pictures
