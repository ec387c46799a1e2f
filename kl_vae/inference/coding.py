"""Encode, decode and reconstruct images of any size.

What has NaN or infinity in half precision is computed again in fp32.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
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
_DAMAGED = (
    "in fp32 has NaN or infinity: the checkpoint's weights are damaged, or not what they are taken "
    "for; give another"
)


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
    device = _device(model)

    def encode(part: slice) -> Tensor:
        x = images[part].to(device, non_blocking=True)
        if x.dtype == torch.uint8:
            x = normalized(x.contiguous())
        return encode_tiled(model, x, tiling).parameters

    size = (images.shape[2], images.shape[3])
    computed = _compute(encode, len(images), device, precision)
    moments = _checked(computed, len(images), device, precision, size, names, "posterior")
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
    device, f = _device(model), model.downsampling_factor

    def decode(part: slice) -> Tensor:
        return decode_tiled(model, z[part].to(device, non_blocking=True), tiling)

    size = (f * z.shape[2], f * z.shape[3])
    computed = _compute(decode, len(z), device, precision)
    images = _checked(computed, len(z), device, precision, size, names, "decoded image")
    return images.clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of one image, or why there is none.

    Attributes:
        image: [C, H, W] in [-1, 1], float32 on the model's device; None: there is none.
        reason: why there is none.
        redone_in_fp32: the precision asked for gave NaN or infinity.
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
    """Reconstruct images of any sizes that have one `padded_size`.

    Their edges are repeated to the right and below, and what that adds is cut off again. What half
    precision makes NaN or infinite is computed again in fp32.

    Where the memory does not suffice each is tried alone, then, even if it is to be done whole, in
    strips that change nothing.

    Args:
        model: in eval mode.
        images: each [C, H, W] in [-1, 1].
        precision: fp32, bf16 or fp16.
        noise: of samples of the posteriors, each [z, h, w]; None: decode the modes.
        tiling: how images that are large for the memory are cut up.
    """
    device = _device(model)
    may_blend = len(images) == 1  # rather one by one, which changes nothing

    def autoencode(part: slice) -> Tensor:
        factor = model.downsampling_factor
        x = torch.stack([pad(image.to(device)[None], factor)[0] for image in images[part]])
        posterior = encode_tiled(model, x, tiling, may_blend=may_blend)
        if noise is None:
            z = posterior.mode()
        else:
            z = posterior.sample(noise=torch.stack([draw.to(device) for draw in noise[part]]))
        decoded = decode_tiled(model, z, tiling, may_blend=may_blend).float()
        # what the decoder makes of NaN may look finite
        finite = posterior.parameters.isfinite().flatten(1).all(1)
        decoded[~finite.to(decoded.device)] = torch.nan
        return decoded

    computed = _compute(autoencode, len(images), device, precision)
    if computed is not None:
        return [
            _cropped(x, image, bad=i in computed.bad, redone=i in computed.redone)
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
    return [Reconstruction(None, f"{reason}; resize or crop, or leave it out")]


def _can_be_exact(model: AutoEncoderKL) -> bool:
    try:
        check_tiling(model, Tiling("exact"))
    except ValueError:
        return False
    return True


def _cropped(decoded: Tensor, image: Tensor, bad: bool, redone: bool) -> Reconstruction:
    if bad:
        return Reconstruction(None, f"the reconstruction {_DAMAGED}", redone)
    x = decoded[:, : image.shape[1], : image.shape[2]]
    return Reconstruction(x.clamp(-1.0, 1.0), redone_in_fp32=redone)


@dataclass(frozen=True)
class _Computed:
    values: Tensor  # [B, ...], float32 on the model's device
    redone: list[int]  # the positions that were computed again in fp32
    bad: list[int]  # those that are not finite in fp32 either


def _compute(
    function: Callable[[slice], Tensor], number: int, device: torch.device, precision: str
) -> _Computed | None:
    """Compute `function` of a batch, and of what is not finite once more in fp32.

    Args:
        function: gives [n, ...] of a part of the batch.
        number: B.
        device: the model's.
        precision: fp32, bf16 or fp16.

    Returns:
        None: the memory does not suffice. The error's frames hold what was computed, and so the
        caller, which tries something smaller, does not see it.
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
    number: int,
    device: torch.device,
    precision: str,
    size: tuple[int, int],
    names: Sequence[str] | None,
    result: str,
) -> Tensor:
    """Return the values on the CPU, unless there are none or they are not finite."""
    if computed is None:
        raise ValueError(
            f"a batch of {number} images of {size[1]} x {size[0]} does not fit into the memory of "
            f"{device}; lower the batch size"
        )
    if computed.redone:
        subject = _subject(computed.redone, number, names)
        logger.warning("%s: NaN or infinity in %s; redone in fp32", subject, precision)
    if computed.bad:
        raise ValueError(f"{_subject(computed.bad, number, names)}: the {result} {_DAMAGED}")
    return computed.values.cpu()


def _subject(positions: Sequence[int], number: int, names: Sequence[str] | None) -> str:
    if names is None:
        return f"{len(positions)} of {number} images"
    others = f" and {len(positions) - 1} more of its batch" if len(positions) > 1 else ""
    return f"{names[positions[0]]}{others}"


def _not_finite(x: Tensor) -> list[int]:
    positions: list[int] = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    return positions


def _device(model: AutoEncoderKL) -> torch.device:
    return next(model.parameters()).device
