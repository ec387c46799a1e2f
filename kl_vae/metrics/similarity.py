"""Image similarity metrics: PSNR, SSIM and MS-SSIM.

Shapes: B batch, C channels, H and W image height and width.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# constants of Wang et al. 2004, section III
WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03

SSIMVariant = Literal["wang", "skimage"]
SSIM_VARIANTS = get_args(SSIMVariant)
_GAUSSIAN = [math.exp(-0.5 * (i - WINDOW // 2) ** 2 / SIGMA**2) for i in range(WINDOW)]
# weights of a window's rows and columns
_WEIGHTS = {"wang": tuple(x / sum(_GAUSSIAN) for x in _GAUSSIAN), "skimage": (1 / 7,) * 7}

SSIM_DEFINITIONS = {
    "wang": "Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5, K1 0.01, K2 0.03, population "
    "variances, windows inside the image, mean over windows and channels (RGB is not converted); "
    "undefined below 11 pixels per side. Same as scikit-image with gaussian_weights=True, "
    "use_sample_covariance=False",
    "skimage": "scikit-image's structural_similarity with default arguments: uniform window 7 x 7, "
    "K1 0.01, K2 0.03, sample variances (n - 1), windows inside the image, mean over windows and "
    "channels (RGB is not converted); undefined below 7 pixels per side",
}
# weights of the scales, finest first (Wang et al. 2003, section 4.2)
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SIDE = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1)  # one window at the coarsest scale


def mse(x: Tensor, y: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Compute the mean squared error per image, scaled to [0, 1]: [B], float64.

    The mean is over all C * H * W values. See `psnr` for the arguments and errors.
    """
    x, y = _in_unit_range(x, y, data_range)
    return (x - y).square().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Compute the peak signal-to-noise ratio, 10 log10((high - low)^2 / MSE), [B] in dB, float64.

    The MSE of an image is over all C * H * W values. The result is inf for identical images.

    Args:
        x: images [B, C, H, W], of any dtype.
        y: images of the same shape; the metric is symmetric.
        data_range: values (low, high) of black and white, such as (-1, 1), or (0, 255) for 8 bits.

    Raises:
        ValueError: the shapes differ or are not [B, C, H, W].
    """
    return -10.0 * mse(x, y, data_range).log10()


def ssim(
    x: Tensor,
    y: Tensor,
    data_range: tuple[float, float] = (-1.0, 1.0),
    variant: SSIMVariant = "wang",
) -> Tensor:
    """Compute the structural similarity (Wang et al. 2004, equation 13), [B] in [-1, 1], float64.

    K1 = 0.01, K2 = 0.03. The mean is over channels and over the windows inside the image, without
    padding, as in the authors' code and scikit-image. torchmetrics pads by reflection and averages
    over the windows at the border, too, so its values differ; inside, they are equal.

    Images are shifted so that black is 0, as in the paper, since the luminance term depends on
    ratios of means.

    Args:
        x: see `psnr`.
        y: see `psnr`.
        data_range: see `psnr`.
        variant: `wang`: Gaussian window of 11 x 11, sigma 1.5, population variances (scikit-image:
            gaussian_weights=True, use_sample_covariance=False); `skimage`: the defaults of
            scikit-image, a uniform window of 7 x 7 and sample variances. The result is NaN for
            images with a side below the window.

    Raises:
        ValueError: see `psnr`; or the variant is unknown.
    """
    if variant not in SSIM_VARIANTS:
        raise ValueError(f"ssim={variant!r}: give one of {', '.join(SSIM_VARIANTS)}")
    x, y = _in_unit_range(x, y, data_range)
    weights = _WEIGHTS[variant]
    if min(x.shape[2:]) < len(weights):
        return x.new_full(x.shape[:1], math.nan)
    number = len(weights) ** 2
    correction = number / (number - 1) if variant == "skimage" else 1.0
    similarity, _ = _similarities(x, y, weights, correction)
    return similarity.flatten(1).mean(1)


def ms_ssim(x: Tensor, y: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Compute the multi-scale structural similarity, [B] in [0, 1], float64.

    Wang et al. (2003), equation 7. It uses five scales, each half the size of the previous one by
    2 x 2 average pooling (an odd last row or column is dropped). At each scale, the contrast and
    structure terms of `ssim` are averaged over channels and windows; at the coarsest, all of SSIM.
    The result is the product of these means, clamped to at least 0, to the powers `SCALE_WEIGHTS`.
    It is NaN for images with a side below 176.

    The values equal those of torchmetrics with default arguments (`normalize="relu"`), which also
    averages over windows in the reflection padding at the coarsest scale.

    See `psnr` for the arguments and errors.
    """
    x, y = _in_unit_range(x, y, data_range)
    if min(x.shape[2:]) < MS_SSIM_SIDE:
        return x.new_full(x.shape[:1], math.nan)
    product = x.new_ones(x.shape[:1])
    for weight in SCALE_WEIGHTS[:-1]:
        _, contrast = _similarities(x, y)
        product *= contrast.flatten(1).mean(1).relu() ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    border = (WINDOW // 2,) * 4
    x, y = F.pad(x, border, mode="reflect"), F.pad(y, border, mode="reflect")
    similarity, _ = _similarities(x, y)
    return product * similarity.flatten(1).mean(1).relu() ** SCALE_WEIGHTS[-1]


def _similarities(
    x: Tensor, y: Tensor, weights: Sequence[float] = _WEIGHTS["wang"], correction: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return SSIM, and its contrast and structure terms, per window, [B, C, H - n + 1, W - n + 1].

    Variances and the covariance of the windows of n x n are multiplied by `correction`.
    """
    mean_x, mean_y = _window_mean(x, weights), _window_mean(y, weights)
    var_x = correction * (_window_mean(x.square(), weights) - mean_x.square())
    var_y = correction * (_window_mean(y.square(), weights) - mean_y.square())
    covariance = correction * (_window_mean(x * y, weights) - mean_x * mean_y)
    c1, c2 = K1**2, K2**2
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance * contrast, contrast


def _in_unit_range(x: Tensor, y: Tensor, data_range: tuple[float, float]) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(
            f"images of shapes {list(x.shape)} and {list(y.shape)}: give equal shapes [B, C, H, W]"
        )
    if x.device.type == "mps":  # float64 is not supported
        x, y = x.cpu(), y.cpu()
    low, high = data_range
    return (x.double() - low) / (high - low), (y.double() - low) / (high - low)


def _window_mean(x: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute the weighted mean of each window of x [B, C, H, W], [B, C, H - n + 1, W - n + 1]."""
    # separable; on the CPU, shifted sums are faster than a float64 convolution
    for dim in (2, 3):
        length = x.shape[dim] - len(weights) + 1
        mean = torch.zeros_like(x.narrow(dim, 0, length))
        for i, weight in enumerate(weights):
            mean.add_(x.narrow(dim, i, length), alpha=weight)
        x = mean
    return x
