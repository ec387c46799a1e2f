"""Checks of the tensors that an autoencoder is given; each error names the shape and the mend.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
height and width, D size of the context vector.
"""

from __future__ import annotations

from torch import Tensor

from kl_vae.ddconfig import DDConfig


def check_images(x: Tensor, config: DDConfig) -> None:
    """Raise ValueError unless x is [B, in_channels, H, W] with H and W multiples of f."""
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(
            f"images of shape {list(x.shape)}: expected [B, {config.in_channels}, H, W]"
        )
    f = config.downsampling_factor
    if x.shape[2] % f or x.shape[3] % f:
        raise ValueError(
            f"images of {x.shape[3]} x {x.shape[2]}: width and height must be multiples of "
            f"{f}; pad or crop them"
        )


def check_latents(z: Tensor, channels: int) -> None:
    """Raise ValueError unless z is [B, channels, h, w]."""
    if z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"latents of shape {list(z.shape)}: expected [B, {channels}, h, w]")


def check_context(context: Tensor | None, config: DDConfig) -> None:
    """Raise ValueError unless there is a context [B, D] where, and only where, one is needed."""
    size = config.context_channels
    if context is None:
        if size:
            raise ValueError(f"context=None: this model needs a context [B, {size}]")
    elif not size:
        raise ValueError("context given: set context_channels in the ddconfig to use one")
    elif context.ndim != 2 or context.shape[1] != size:
        raise ValueError(f"context of shape {list(context.shape)}: expected [B, {size}]")
