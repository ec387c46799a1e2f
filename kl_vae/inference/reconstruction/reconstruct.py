"""Encode and decode images of any size.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
height and width, f = H / h.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kl_vae.inference.padding import latent_noise, pad
from kl_vae.inference.tiling import Tiling, check_tiling, decode_tiled, encode_tiled
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.device import autocast
from kl_vae.runtime.memory import is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reconstruction:
    """What became of an image.

    Attributes:
        image: [C, H, W] in [-1, 1], float32 on the model's device; None: there is none.
        reason: why there is none.
        redone_in_fp32: the precision asked for gave NaN or infinity.
    """

    image: Tensor | None
    reason: str = ""
    redone_in_fp32: bool = False


def reconstruct(
    model: AutoEncoderKL,
    image: Tensor,
    precision: str = "fp32",
    generator: torch.Generator | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Reconstruct one image [C, H, W] in [-1, 1] of any size; the result is like it, on the CPU.

    Its edge is repeated to the right and below up to a multiple of f, at least 2 f, and what that
    adds is cut off again. Where half precision gives NaN or infinity it is redone in fp32.

    Args:
        model: in eval mode.
        image: on any device.
        precision: fp32, bf16 or fp16.
        generator: decode a sample of the posterior, drawn with it; None: decode the mode.
        tiling: how an image that is large for the memory is cut up; None: as `Tiling` does.

    Raises:
        ValueError: the result is not finite, or the memory does not suffice.
    """
    noise = None if generator is None else [latent_noise(model, image, generator)]
    (result,) = reconstruct_batch(model, [image], precision, noise, tiling or Tiling())
    if result.image is None:
        raise ValueError(result.reason)
    if result.redone_in_fp32:
        logger.warning("NaN or infinity in %s: the image was redone in fp32", precision)
    return result.image.cpu()


@torch.inference_mode()
def reconstruct_batch(
    model: AutoEncoderKL,
    images: Sequence[Tensor],
    precision: str,
    noise: Sequence[Tensor] | None,
    tiling: Tiling,
) -> list[Reconstruction]:
    """Reconstruct images that have one `padded_size`; see `reconstruct`.

    Where the memory does not suffice each is tried alone, then, even if it is to be done whole, in
    strips that change nothing.

    Args:
        model: in eval mode.
        images: each [C, H, W] in [-1, 1].
        precision: fp32, bf16 or fp16.
        noise: of samples of the posteriors, each [z, h, w]; None: decode the modes.
        tiling: how images that are large for the memory are cut up.
    """
    decoded = _decoded(model, images, precision, noise, tiling)
    if decoded is not None:
        results = [_cropped(x, image) for x, image in zip(decoded, images, strict=True)]
    elif len(images) > 1:
        return [
            _alone(model, images[i], precision, noise[i] if noise else None, tiling)
            for i in range(len(images))
        ]
    elif tiling.mode == "whole" and _can_be_exact(model):
        return reconstruct_batch(model, images, precision, noise, replace(tiling, mode="exact"))
    else:
        height, width = images[0].shape[1:]
        reason = (
            f"{width} x {height} pixels do not fit into the memory of "
            f"{next(model.parameters()).device}; resize or crop, or leave it out"
        )
        return [Reconstruction(None, reason)]
    for i, result in enumerate(results):
        if result.image is None and precision != "fp32":
            again = _alone(model, images[i], "fp32", noise[i] if noise else None, tiling)
            results[i] = replace(again, redone_in_fp32=True)
    return results


def _can_be_exact(model: AutoEncoderKL) -> bool:
    try:
        check_tiling(model, Tiling("exact"))
    except ValueError:
        return False
    return True


def _alone(
    model: AutoEncoderKL, image: Tensor, precision: str, noise: Tensor | None, tiling: Tiling
) -> Reconstruction:
    (result,) = reconstruct_batch(
        model, [image], precision, None if noise is None else [noise], tiling
    )
    return result


def _decoded(
    model: AutoEncoderKL,
    images: Sequence[Tensor],
    precision: str,
    noise: Sequence[Tensor] | None,
    tiling: Tiling,
) -> Tensor | None:
    """[B, C, H, W], NaN where the latents are not finite; None: the memory does not suffice."""
    device = next(model.parameters()).device
    may_blend = len(images) == 1  # rather one by one, which changes nothing
    try:
        x = torch.stack([pad(image.to(device), model.downsampling_factor) for image in images])
        with autocast(device, precision):
            posterior = encode_tiled(model, x, tiling, may_blend=may_blend)
            if noise is None:
                z = posterior.mode()
            else:
                z = posterior.sample(noise=torch.stack([draw.to(device) for draw in noise]))
            decoded = decode_tiled(model, z, tiling, may_blend=may_blend)
        decoded = decoded.float()
        finite = posterior.parameters.isfinite().flatten(1).all(1)
        decoded[~finite.to(decoded.device)] = torch.nan
        return decoded
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None  # what the error's frames hold is free where the caller goes on


def _cropped(decoded: Tensor, image: Tensor) -> Reconstruction:
    x = decoded[:, : image.shape[1], : image.shape[2]]
    if not x.isfinite().all():
        reason = (
            "the reconstruction in fp32 has NaN or infinity: the checkpoint's weights are damaged, "
            "or not what they are taken for; give another"
        )
        return Reconstruction(None, reason)
    return Reconstruction(x.clamp(-1.0, 1.0))
