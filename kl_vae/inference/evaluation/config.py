"""What an evaluation measures, and on which part of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kl_vae.data.config import check_crop_fits
from kl_vae.model import AutoEncoderKL


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and on which images.

    Attributes:
        resize: short side that images are resized to first, in pixels; None: as they are.
        crop: side of the square that is then cut out of the middle; None: the whole image.
        mode: decode the posterior's `mode`, or a `sample` of it.
        seed: of the samples; each also depends on its image's path.
        precision: fp32, bf16 or fp16.
        metrics: some of psnr, ssim, ms_ssim, lpips and rfid.
    """

    resize: int | None
    crop: int | None
    mode: str = "mode"
    seed: int = 0
    precision: str = "fp32"
    metrics: tuple[str, ...] = ("psnr", "ssim", "ms_ssim")


def choose_size(
    models: Sequence[AutoEncoderKL],
    names: Sequence[str],
    resize: int | None,
    crop: int | None,
    whole: bool,
) -> tuple[int | None, int | None]:
    """What images are resized to and what is cut out: without a crop the models' resolution.

    Args:
        models: that are to be compared.
        names: of them.
        resize: as asked for; None: to the crop.
        crop: as asked for; None: the resolution.
        whole: neither, but for a resize that is asked for.

    Raises:
        ValueError: models that cannot be compared, or sizes that exclude each other.
    """
    _check_alike("in_channels", models, names, "give checkpoints for the same kind of images")
    if whole and crop is not None:
        raise ValueError(f"crop={crop}: whole images have none; give --crop or --whole")
    if whole:
        return resize, None
    if crop is None:
        _check_alike("resolution", models, names, "give --crop for all of them, or --whole")
        crop = models[0].config.resolution
    check_crop_fits(crop if resize is None else resize, crop)
    return resize or crop, crop


def _check_alike(
    key: str, models: Sequence[AutoEncoderKL], names: Sequence[str], mend: str
) -> None:
    values = [getattr(model.config, key) for model in models]
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise ValueError(f"{key}={values[0]} of {names[0]} and {value} of {name}: {mend}")
