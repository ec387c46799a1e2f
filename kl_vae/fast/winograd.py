"""3 x 3 convolutions with a quarter of the multiplications, on CPUs in float32 without gradients.

Lavin & Gray 2016, "Fast algorithms for convolutional neural networks", F(4x4, 3x3): tiles of 6 x 6
of the input are transformed, multiplied elementwise by transformed kernels, and transformed to
tiles of 4 x 4 of the output. The sums over the input channels make of the multiplications 36 matrix
products, one for each place in the tile, and the transforms are matrix products as well
(`kl_vae.fast.tile_transforms`). Some rows of tiles are taken at a time, so that all that lies
between input and output stays in the cache.

On outputs of variance 1, with 512 channels, the largest error against float64 is about 1.5e-5,
where the direct convolution has 2e-6. It depends on the points at which the transforms evaluate
polynomials: with the 0, 1, -1, 2, -2 of the paper it would be 5e-5.

B batch, C channels, O channels of the output, H and W height and width, n tiles, P products, S the
scale of the output: 1, or 2 where the map is upsampled first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.fast.scratch import scratch
from kl_vae.fast.tile_transforms import TileTransform, of_convolution, of_upsampled

CONVOLUTION, UPSAMPLED = of_convolution(), of_upsampled()

# of a piece: the cache holds their transforms, and the kernels are read often enough (measured)
TILES = 128

# below these the direct convolution is as fast (measured)
FEWEST_CHANNELS = 64
FEWEST_POSITIONS = 512


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 and padding 1 that is computed so where that is possible.

    Only the class tells it from `nn.Conv2d`: it has the same parameters, and with gradients, on
    another device, in another precision, compiled, or where it would not pay, the same forward.
    """

    def forward(self, x: Tensor) -> Tensor:
        if suits(x, self.weight):
            return winograd_convolve(x, self.weight, self.bias)
        return super().forward(x)


def is_3_by_3(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module computes a 3 x 3 convolution of stride 1 and padding 1, and only that.

    A subclass or a parametrization may compute something else.
    """
    return (
        type(module) in (nn.Conv2d, WinogradConv2d)
        and isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.padding == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of x [B, C, H, W] is possible here, and pays."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and x.shape[0] * x.shape[2] * x.shape[3] >= FEWEST_POSITIONS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def winograd_convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int] = (1, 1),
    *,
    activation: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    transforms: Sequence[TileTransform] = CONVOLUTION,
) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=padding)` in channels_last, to rounding.

    Args:
        x: [B, C, H, W], in any memory format.
        weight: [O, C, 3, 3].
        bias: [O] or None.
        padding: rows of zeros above and below, columns of them at the left and right.
        activation: scale and shift, [B, 1, 1, C] each: silu(scale * x + shift) is convolved.
        residual: a map of the output's shape, which is added to it.
        transforms: CONVOLUTION, or UPSAMPLED: x is upsampled by 2, nearest, before it is convolved,
            and the padding is that of x as it is given.
    """
    batch, channels, height, width = x.shape
    out_channels = weight.shape[0]
    scale = 1 + transforms[-1].row
    rows, columns = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2  # of all tiles' middles
    down, across = ceil(rows / 4), ceil(columns / 4)  # tiles
    images, lines = _piece(batch, down, across)
    n = images * lines * across

    kernels = _transformed(weight, transforms)  # [P, O, C] each
    most = max(transform.number for transform in transforms)
    pixels = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    out = x.new_empty(batch, 4 * scale * down, 4 * scale * across, out_channels)
    # of one piece
    padded = scratch("padded", images, 4 * lines + 2, 4 * across + 2, channels).zero_()
    tiles = scratch("tiles", 6, 6, images, lines, across, channels)
    transformed = scratch("transformed", most, n, channels)
    products = scratch("products", most, n, out_channels)
    results = scratch("results", 4, 4, images, lines, across, out_channels)

    for image in _starts(batch, images):
        for line in _starts(down, lines):
            top = 4 * line - padding[0]  # the first row of the input that is needed
            first, last = max(top, 0), min(top + 4 * lines + 2, height)
            padded[:, : first - top].zero_()
            padded[:, last - top :].zero_()
            inside = padded[:, first - top : last - top, padding[1] : padding[1] + width]
            piece = pixels[image : image + images, first:last]
            if activation is None:
                inside.copy_(piece)
            else:
                factor, shift = (y[image : image + images] for y in activation)
                F.silu(torch.mul(piece, factor, out=inside).add_(shift), inplace=True)
            # [images, lines, across, C, 6, 6]
            tiles.copy_(padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3))
            written = out[image : image + images].narrow(1, 4 * scale * line, 4 * scale * lines)
            by_phase = written.view(images, lines, 4, scale, across, 4, scale, out_channels)
            for transform, kernel in zip(transforms, kernels, strict=True):
                number = transform.number
                torch.mm(transform.inputs, tiles.view(36, -1), out=transformed[:number].flatten(1))
                torch.bmm(transformed[:number], kernel.transpose(1, 2), out=products[:number])
                torch.mm(transform.output, products[:number].flatten(1), out=results.view(16, -1))
                phase = by_phase[:, :, :, transform.row, :, :, transform.column]
                by_tile = phase.permute(2, 4, 0, 1, 3, 5)
                if bias is None:
                    by_tile.copy_(results)
                else:
                    torch.add(results, bias, out=by_tile)
            if residual is not None:
                added = residual.permute(0, 2, 3, 1)[image : image + images, 4 * scale * line :]
                added = added[:, : 4 * scale * lines]
                written[:, : added.shape[1], : scale * columns].add_(added)
    return out[:, : scale * rows, : scale * columns].contiguous().permute(0, 3, 1, 2)


def _transformed(weight: Tensor, transforms: Sequence[TileTransform]) -> tuple[Tensor, ...]:
    """The kernels [O, C, 3, 3] as each transform has them, [P, O, C]."""
    numbers = [transform.number for transform in transforms]
    kernels = scratch("kernels", sum(numbers), *weight.shape[:2])
    each = torch.split(kernels, numbers)
    taps = weight.reshape(-1, 9).t()
    for transform, kernel in zip(transforms, each, strict=True):
        torch.mm(transform.kernel, taps, out=kernel.flatten(1))
    return each


def _piece(batch: int, down: int, across: int) -> tuple[int, int]:
    """Images and lines of tiles to take at a time, about as many each time."""
    lines = _even(down, max(1, TILES // across))
    return _even(batch, max(1, TILES // (down * across))), lines


def _even(total: int, most: int) -> int:
    return ceil(total / ceil(total / most))


def _starts(total: int, size: int) -> Iterator[int]:
    """Where pieces of one size start that cover 0 to `total`; the last may overlap the others."""
    for start in range(0, total, size):
        yield min(start, total - size)
