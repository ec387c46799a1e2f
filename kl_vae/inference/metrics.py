"""How close a reconstruction is to its image: PSNR and SSIM.

B batch, C channels, H and W the image's height and width.
"""

import math

import torch
from torch import Tensor

# the constants of Wang et al. 2004, section III
WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03


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
    x, y = _in_unit_range(x, y, data_range)
    mse = (x - y).square().flatten(1).mean(1)
    return -10.0 * mse.log10()


def ssim(x: Tensor, y: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13), [B] in [-1, 1], float64.

    Gaussian window of 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03, weighted population variances.
    The mean is over the windows that lie wholly inside the image (no padding) and over channels.
    Images with a side below 11 have no window and get NaN.

    Black counts as 0, as in the paper: the luminance term is about ratios of means, and values
    from -1 to 1 taken as they are would give another figure than the same images in 8 bits.

    Args and Raises are those of `psnr`.
    """
    x, y = _in_unit_range(x, y, data_range)
    if min(x.shape[2:]) < WINDOW:
        return x.new_full(x.shape[:1], math.nan)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x.square()) - mean_x.square()
    var_y = _window_mean(y.square()) - mean_y.square()
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    )
    return similarity.flatten(1).mean(1)


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
