"""Images to posteriors and latents to images, of any size, that can be relied on.

What has NaN or infinity in half precision is computed again in fp32, with a warning.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kl_vae.data import normalized
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.tiling import Tiling, decode_tiled, encode_tiled
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.device import autocast
from kl_vae.runtime.memory import is_out_of_memory

logger = logging.getLogger(__name__)

_AUTO = Tiling()


@torch.inference_mode()
def encode_images(
    model: AutoEncoderKL,
    images: Tensor,
    precision: str = "fp32",
    tiling: Tiling = _AUTO,
    names: Sequence[str] | None = None,
) -> DiagonalGaussianDistribution:
    """Encode images [B, C, H, W] in [-1, 1], or uint8; the posteriors are on the CPU.

    Args:
        model: in eval mode.
        images: on any device; f divides their sides. uint8 is mapped to [-1, 1] on the model's.
        precision: fp32, bf16 or fp16.
        tiling: how images that are large for the memory are cut up.
        names: of the B images, for messages.

    Raises:
        ValueError: moments are not finite in fp32, or the memory does not suffice.
    """

    def encode(x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = normalized(x.contiguous())
        return encode_tiled(model, x, tiling).parameters

    size = (images.shape[2], images.shape[3])
    moments = _compute(model, encode, images, precision, size, names, "posterior")
    return DiagonalGaussianDistribution(moments)


@torch.inference_mode()
def decode_latents(
    model: AutoEncoderKL,
    z: Tensor,
    precision: str = "fp32",
    tiling: Tiling = _AUTO,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Decode latents [B, z, h, w] to images [B, C, H, W] in [-1, 1], float32 on the CPU.

    The arguments are those of `encode_images`.

    Raises:
        ValueError: an image is not finite in fp32, or the memory does not suffice.
    """
    f = model.downsampling_factor

    def decode(z: Tensor) -> Tensor:
        return decode_tiled(model, z, tiling)

    size = (f * z.shape[2], f * z.shape[3])
    images = _compute(model, decode, z, precision, size, names, "decoded image")
    return images.clamp(-1.0, 1.0)


def _compute(
    model: AutoEncoderKL,
    function: Callable[[Tensor], Tensor],
    batch: Tensor,
    precision: str,
    size: tuple[int, int],
    names: Sequence[str] | None,
    result: str,
) -> Tensor:
    """`function` of a batch, float32 on the CPU, finite."""
    device = next(model.parameters()).device

    def compute(x: Tensor, precision: str) -> Tensor:
        try:
            with autocast(device, precision):
                return function(x.to(device, non_blocking=True)).float().cpu()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"a batch of {len(x)} images of {size[1]} x {size[0]} does not fit into the "
                f"memory of {device}; lower the batch size"
            ) from None

    computed = compute(batch, precision)
    bad = _not_finite(computed)
    if bad and precision != "fp32":
        logger.warning(
            "%s: NaN or infinity in %s; redone in fp32", _some(bad, len(batch), names), precision
        )
        for i in bad:
            computed[i] = compute(batch[i : i + 1], "fp32")[0]
        bad = _not_finite(computed)
    if bad:
        raise ValueError(
            f"{_some(bad, len(batch), names)}: the {result} in fp32 has NaN or infinity: the "
            "checkpoint's weights are damaged, or not what they are taken for; give another"
        )
    return computed


def _not_finite(x: Tensor) -> list[int]:
    bad: list[int] = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    return bad


def _some(bad: Sequence[int], number: int, names: Sequence[str] | None) -> str:
    if names is None:
        return f"{len(bad)} of {number} images"
    others = f" and {len(bad) - 1} more of its batch" if len(bad) > 1 else ""
    return f"{names[bad[0]]}{others}"
