"""3 x 3 convolutions with a quarter of the multiplications, on CPUs in float32 without gradients.

Lavin & Gray 2016, "Fast algorithms for convolutional neural networks", F(4x4, 3x3): an output tile
of 4 x 4 needs a tile d of 6 x 6 of the input, and is

    A^T [(G g G^T) * (B^T d B)] A

for one channel and its kernel g, where * is elementwise: 36 multiplications for what takes 144
directly. The sums over the input channels are then 36 matrix products, one for each place in the
tile. The transforms are matrix products too: what stands left and right of a flattened tile is one
Kronecker product. A few rows of tiles are taken at a time, so that they stay in the cache.

The columns of A^T, rows of G and rows of B^T stand for the points at which polynomials are
evaluated: 0, 1, -1, 1/2, -1/2 and infinity (the points decide the rounding errors: with 2 in place
of 1/2, as published, they are larger by half). The largest error is about 3 times the direct
convolution's.

B batch, C channels, O channels of the output, H and W height and width, n tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, prod
from threading import local

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)

# of transformed tiles, input and output together: what the cache of a core holds
TILE_BYTES = 8 * 2**20

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


def is_3_by_3(conv: nn.Module) -> bool:
    """Whether `conv` computes a 3 x 3 convolution of stride 1 and padding 1, and only that.

    A subclass may compute something else, a hook change what goes in or comes out.
    """
    return (
        type(conv) in (nn.Conv2d, WinogradConv2d)
        and isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not conv._forward_hooks
        and not conv._forward_pre_hooks
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
        and not torch.jit.is_tracing()
    )


def winograd_convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int] = (1, 1),
    *,
    activation: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=padding)` in channels_last, to rounding.

    Args:
        x: [B, C, H, W], in any memory format.
        weight: [O, C, 3, 3].
        bias: [O] or None.
        padding: rows of zeros above and below, columns of them at the left and right.
        activation: scale and shift, [B, 1, 1, C] each: silu(scale * x + shift) is convolved.
        residual: a map of the output's shape, which is added to it.
    """
    batch, channels, height, width = x.shape
    out_channels = weight.shape[0]
    rows, columns = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2  # of the output
    down, across = ceil(rows / 4), ceil(columns / 4)  # tiles
    images, lines = _piece(batch, down, across, channels + out_channels)
    n = images * lines * across

    kernels = _transformed(weight)  # [36, O, C]
    pixels = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    out = x.new_empty(batch, 4 * down, 4 * across, out_channels)
    # of one piece
    padded = _scratch("padded", images, 4 * lines + 2, 4 * across + 2, channels).zero_()
    tiles = _scratch("tiles", 6, 6, images, lines, across, channels)
    transformed = _scratch("transformed", 36, n, channels)
    products = _scratch("products", 36, n, out_channels)
    results = _scratch("results", 4, 4, images, lines, across, out_channels)

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
                scale, shift = (y[image : image + images] for y in activation)
                F.silu(torch.mul(piece, scale, out=inside).add_(shift), inplace=True)
            # [images, lines, across, C, 6, 6]
            tiles.copy_(padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3))
            torch.mm(_INPUT, tiles.view(36, -1), out=transformed.view(36, -1))
            torch.bmm(transformed, kernels.transpose(1, 2), out=products)
            torch.mm(_OUTPUT, products.view(36, -1), out=results.view(16, -1))
            written = out[image : image + images, 4 * line : 4 * (line + lines)]
            by_tile = written.view(images, lines, 4, across, 4, out_channels)
            by_tile = by_tile.permute(2, 4, 0, 1, 3, 5)
            if bias is None:
                by_tile.copy_(results)
            else:
                torch.add(results, bias, out=by_tile)
            if residual is not None:
                added = residual.permute(0, 2, 3, 1)[image : image + images, 4 * line :]
                added = added[:, : 4 * lines]
                written[:, : added.shape[1], :columns].add_(added)
    return out[:, :rows, :columns].contiguous().permute(0, 3, 1, 2)


def _transformed(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] -> G g G^T of each, [36, O, C]."""
    kernels = _scratch("kernels", 36, *weight.shape[:2])
    torch.mm(_KERNEL, weight.reshape(-1, 9).t(), out=kernels.view(36, -1))
    return kernels


def _scratch(use: str, *shape: int) -> Tensor:
    """Memory that is kept from call to call, for each thread and use.

    To get new pages from the system takes several times as long as to write to them.
    """
    kept: Tensor | None = getattr(_KEPT, use, None)
    if kept is None or kept.numel() < prod(shape):
        with torch.inference_mode(False):  # usable in that mode and out of it
            kept = torch.empty(prod(shape), device="cpu")
        setattr(_KEPT, use, kept)
    return kept[: prod(shape)].view(shape)


def _piece(batch: int, down: int, across: int, channels: int) -> tuple[int, int]:
    """Images and lines of tiles to take at a time, about alike in number each time."""
    tiles = max(1, TILE_BYTES // (4 * 36 * channels))
    lines = _even(down, max(1, tiles // across))
    return _even(batch, max(1, tiles // (down * across))), lines


def _even(total: int, most: int) -> int:
    return ceil(total / ceil(total / most))


def _starts(total: int, size: int) -> Iterator[int]:
    """Where pieces of one size start that cover 0 to `total`; the last may overlap the others."""
    for start in range(0, total, size):
        yield min(start, total - size)


def _matrices(points: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """B^T [6, 6], G [6, 3] and A^T [4, 6] of F(4, 3): points and infinity, as Cook and Toom do.

    With the other points q of a point p, whose row or column of B^T, G and A^T are: the
    coefficients of prod (x - q), the powers of p over prod (p - q), and the powers of p.
    """
    number = len(points)
    inputs, kernel, output = (
        torch.zeros(6, n, dtype=torch.float64, device="cpu") for n in (6, 3, 4)
    )
    for row, p in enumerate(points):
        others = [q for q in points if q != p]
        inputs[row, :number] = _coefficients(others)
        scale = torch.tensor([p - q for q in others], dtype=torch.float64, device="cpu").prod()
        powers = torch.tensor([p**k for k in range(4)], dtype=torch.float64, device="cpu")
        kernel[row] = powers[:3] / scale
        output[row] = powers
    inputs[-1] = _coefficients(points)
    kernel[-1, -1] = output[-1, -1] = 1.0
    return inputs, kernel, output.t()


def _coefficients(roots: list[float] | tuple[float, ...]) -> Tensor:
    """Of the product of x - root, lowest first."""
    polynomial = torch.ones(1, dtype=torch.float64, device="cpu")
    zero = torch.zeros_like(polynomial)
    for root in roots:
        polynomial = torch.cat((zero, polynomial)) - root * torch.cat((polynomial, zero))
    return polynomial


_INPUT, _KERNEL, _OUTPUT = (
    torch.kron(matrix, matrix).float() for matrix in _matrices(POINTS)
)  # [36, 36], [36, 9], [16, 36]

_KEPT = local()
