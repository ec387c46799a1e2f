"""How close a reconstruction is to its image: PSNR, SSIM and MS-SSIM.

B batch, C channels, H and W the image's height and width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# the constants of Wang et al. 2004, section III
WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03
# of Wang et al. 2003, section 4.2: how much each scale counts, the finest first
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SIDE = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1)  # the coarsest scale has one window then


def mse(x: Tensor, y: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Mean squared error over all C * H * W values, [B], float64, of images scaled to [0, 1].

    Args and Raises are those of `psnr`.
    """
    x, y = _in_unit_range(x, y, data_range)
    return (x - y).square().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10((high - low)^2 / MSE), [B] in dB, float64.

    The MSE of an image is over all its C * H * W values. Identical images have inf.

    Args:
        x: images [B, C, H, W], of any dtype.
        y: images of the same shape; the measure is symmetric.
        data_range: (low, high), black and white: (-1, 1), or (0, 255) for 8 bits.

    Raises:
        ValueError: the shapes differ or are not [B, C, H, W].
    """
    return -10.0 * mse(x, y, data_range).log10()


def ssim(x: Tensor, y: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13), [B] in [-1, 1], float64.

    Gaussian window of 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03, weighted population variances.
    The mean is over the windows that lie wholly inside the image (no padding) and over channels.
    Images with a side below 11 have no window and get NaN.

    Black counts as 0, as in the paper: the luminance term is about ratios of means, and values
    from -1 to 1 taken as they are would give another value than the same images in 8 bits.

    Args and Raises are those of `psnr`.
    """
    x, y = _in_unit_range(x, y, data_range)
    if min(x.shape[2:]) < WINDOW:
        return x.new_full(x.shape[:1], math.nan)
    similarity, _ = _similarities(x, y)
    return similarity.flatten(1).mean(1)


def ms_ssim(x: Tensor, y: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Multi-scale structural similarity (Wang et al. 2003, equation 7), [B] in [0, 1], float64.

    Five scales, each half as large as the one before by means of 2 x 2 pixels (an odd last row or
    column is left out). At each the contrast and structure terms of `ssim` are averaged over
    channels and windows, at the coarsest all of SSIM; their product is weighted by
    `SCALE_WEIGHTS`, a negative mean counting as 0. Images with a side below 176 get NaN.

    These are the values of torchmetrics with its defaults (`normalize="relu"`): as there, the mean
    at the coarsest scale is also over windows that reach into the image's reflection at its border.

    Args and Raises are those of `psnr`.
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


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM, and its contrast and structure terms alone, of each window, [B, C, H - 10, W - 10]."""
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x.square()) - mean_x.square()
    var_y = _window_mean(y.square()) - mean_y.square()
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance * contrast, contrast


def _in_unit_range(x: Tensor, y: Tensor, data_range: tuple[float, float]) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(
            f"images of shapes {list(x.shape)} and {list(y.shape)}: give two of one [B, C, H, W]"
        )
    if x.device.type == "mps":  # has no float64
        x, y = x.cpu(), y.cpu()
    low, high = data_range
    return (x.double() - low) / (high - low), (y.double() - low) / (high - low)


def _window_mean(x: Tensor) -> Tensor:
    """[B, C, H, W] -> the weighted means of all windows, [B, C, H - 10, W - 10]."""
    weights = [math.exp(-0.5 * (i - WINDOW // 2) ** 2 / SIGMA**2) for i in range(WINDOW)]
    total = sum(weights)
    # the Gaussian is separable; on the CPU shifted sums are faster than a float64 convolution
    for dim in (2, 3):
        length = x.shape[dim] - WINDOW + 1
        mean = torch.zeros_like(x.narrow(dim, 0, length))
        for i, weight in enumerate(weights):
            mean.add_(x.narrow(dim, i, length), alpha=weight / total)
        x = mean
    return x
