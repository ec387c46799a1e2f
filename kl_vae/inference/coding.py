"""Encoding, decoding and reconstruction of images of any size.

Results that contain NaN or infinity under autocast are recomputed without it, in the precision of
the weights.

Shapes: B batch, C channels, H and W image height and width, z latent channels, h and w latent
height and width, f = H / h.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kl_vae.data import normalized
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.inference.tiling import Tiling, check_tiling, decode_tiled, encode_tiled
from kl_vae.model import AutoEncoderKL, pad
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
    """Encode images [B, C, H, W] and return their posteriors on the CPU.

    Args:
        model: the autoencoder, in eval mode.
        images: float in [-1, 1], or uint8, which is mapped to [-1, 1] on the model's device. May
            be on any device. H and W are multiples of f.
        precision: fp32, bf16 or fp16.
        tiling: how large images are split to fit into memory.
        names: names of the B images, used in messages.

    Raises:
        ValueError: the moments are not finite in fp32, or the device runs out of memory.
    """
    device = _device(model)

    def encode(part: slice) -> Tensor:
        x = images[part].to(device, non_blocking=True)
        if x.dtype == torch.uint8:
            x = normalized(x.contiguous())
        return encode_tiled(model, x, tiling).parameters

    size = (images.shape[2], images.shape[3])
    computed = _compute(encode, len(images), device, precision)
    moments = _checked(computed, model, len(images), precision, size, names, "posterior")
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

    The arguments are the same as for `encode_images`.

    Raises:
        ValueError: an image is not finite in fp32, or the device runs out of memory.
    """
    device, f = _device(model), model.downsampling_factor

    def decode(part: slice) -> Tensor:
        return decode_tiled(model, z[part].to(device, non_blocking=True), tiling)

    size = (f * z.shape[2], f * z.shape[3])
    computed = _compute(decode, len(z), device, precision)
    images = _checked(computed, model, len(z), precision, size, names, "decoded image")
    return images.clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction of one image, or the reason for its failure.

    Attributes:
        image: [C, H, W] in [-1, 1], float32 on the model's device; None on failure.
        reason: reason for the failure; empty on success.
        redone_in_fp32: whether the requested precision produced NaN or infinity.
    """

    image: Tensor | None
    reason: str = ""
    redone_in_fp32: bool = False


@torch.inference_mode()
def reconstruct_batch(
    model: AutoEncoderKL,
    images: Sequence[Tensor],
    precision: str,
    noise: Sequence[Tensor] | None,
    tiling: Tiling,
) -> list[Reconstruction]:
    """Reconstruct images of any sizes that share one `padded_size`.

    Images are padded at the right and bottom by repeating their edges, and the results are cropped
    to the original sizes. Results that contain NaN or infinity in half precision are recomputed in
    fp32.

    If the device runs out of memory, each image is retried alone and then, even in mode `whole`,
    in strips, which give the same result.

    Args:
        model: the autoencoder, in eval mode.
        images: each [C, H, W] in [-1, 1].
        precision: fp32, bf16 or fp16.
        noise: standard normal noise for posterior samples, each [z, h, w]; None decodes the modes.
        tiling: how large images are split to fit into memory.
    """
    device = _device(model)
    may_blend = len(images) == 1  # larger batches are split first, which is exact

    def autoencode(part: slice) -> Tensor:
        factor = model.downsampling_factor
        x = torch.stack([pad(image.to(device)[None], factor)[0] for image in images[part]])
        posterior = encode_tiled(model, x, tiling, may_blend=may_blend)
        if noise is None:
            z = posterior.mode()
        else:
            z = posterior.sample(noise=torch.stack([draw.to(device) for draw in noise[part]]))
        decoded = decode_tiled(model, z, tiling, may_blend=may_blend).float()
        # the decoder may map NaN to finite values
        finite = posterior.parameters.isfinite().flatten(1).all(1)
        decoded[~finite.to(decoded.device)] = torch.nan
        return decoded

    computed = _compute(autoencode, len(images), device, precision)
    if computed is not None:
        return [
            _cropped(x, image, model, bad=i in computed.bad, redone=i in computed.redone)
            for i, (x, image) in enumerate(zip(computed.values, images, strict=True))
        ]
    if len(images) > 1:
        parts = [slice(i, i + 1) for i in range(len(images))]
        draws = [None if noise is None else noise[part] for part in parts]
        return [
            reconstruct_batch(model, images[part], precision, draw, tiling)[0]
            for part, draw in zip(parts, draws, strict=True)
        ]
    if tiling.mode == "whole" and _can_be_exact(model):
        return reconstruct_batch(model, images, precision, noise, replace(tiling, mode="exact"))
    height, width = images[0].shape[1:]
    reason = f"{width} x {height} pixels do not fit into the memory of {device}"
    return [Reconstruction(None, f"{reason}; resize, crop or exclude the image")]


def _can_be_exact(model: AutoEncoderKL) -> bool:
    try:
        check_tiling(model, Tiling("exact"))
    except ValueError:
        return False
    return True


def _cropped(
    decoded: Tensor, image: Tensor, model: AutoEncoderKL, bad: bool, redone: bool
) -> Reconstruction:
    if bad:
        return Reconstruction(None, f"the reconstruction {_not_finite_in(model)}", redone)
    x = decoded[:, : image.shape[1], : image.shape[2]]
    return Reconstruction(x.clamp(-1.0, 1.0), redone_in_fp32=redone)


@dataclass(frozen=True)
class _Computed:
    values: Tensor  # [B, ...], float32 on the model's device
    redone: list[int]  # positions that were recomputed in fp32
    bad: list[int]  # positions that are not finite in fp32 either


def _compute(
    function: Callable[[slice], Tensor], number: int, device: torch.device, precision: str
) -> _Computed | None:
    """Apply `function` to a batch, and recompute non-finite results in fp32.

    Args:
        function: maps a slice of the batch to values [n, ...].
        number: batch size B.
        device: device of the model.
        precision: fp32, bf16 or fp16.

    Returns:
        The values; None if the device runs out of memory. The error itself is not passed on,
        because its stack frames would keep the computed tensors alive while the caller retries.
    """
    try:
        with autocast(device, precision):
            values = function(slice(0, number)).float()
        redone = [] if precision == "fp32" else _not_finite(values)
        with autocast(device, "fp32"):
            for i in redone:
                values[i] = function(slice(i, i + 1)).float()[0]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return _Computed(values, redone, _not_finite(values))


def _checked(
    computed: _Computed | None,
    model: AutoEncoderKL,
    number: int,
    precision: str,
    size: tuple[int, int],
    names: Sequence[str] | None,
    result: str,
) -> Tensor:
    """Return the values on the CPU.

    Raises:
        ValueError: the device ran out of memory, or a value is not finite.
    """
    if computed is None:
        raise ValueError(
            f"a batch of {number} images of {size[1]} x {size[0]} does not fit into the memory of "
            f"{_device(model)}; reduce the batch size"
        )
    if computed.redone:
        subject = _subject(computed.redone, number, names)
        logger.warning("%s: NaN or infinity in %s; recomputed in fp32", subject, precision)
    if computed.bad:
        subject = _subject(computed.bad, number, names)
        raise ValueError(f"{subject}: the {result} {_not_finite_in(model)}")
    return computed.values.cpu()


def _not_finite_in(model: AutoEncoderKL) -> str:
    """Return the end of the message for values that are not finite without autocast."""
    if model.dtype in (torch.float16, torch.bfloat16):
        return f"contains NaN or infinity with weights of {model.dtype}; call model.float()"
    return (
        "contains NaN or infinity in fp32: the checkpoint's weights are damaged or belong to "
        "another architecture; use another checkpoint"
    )


def _subject(positions: Sequence[int], number: int, names: Sequence[str] | None) -> str:
    if names is None:
        return f"{len(positions)} of {number} images"
    rest = f" and {len(positions) - 1} more in its batch" if len(positions) > 1 else ""
    return f"{names[positions[0]]}{rest}"


def _not_finite(x: Tensor) -> list[int]:
    positions: list[int] = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    return positions


def _device(model: AutoEncoderKL) -> torch.device:
    return next(model.parameters()).device
