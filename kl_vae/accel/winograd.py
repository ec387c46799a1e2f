"""3 x 3 convolutions and their gradients with a quarter of the multiplications, on CPUs in float32.

Lavin & Gray 2016, "Fast algorithms for convolutional neural networks", F(4x4, 3x3): tiles of 6 x 6
of the input are transformed, multiplied elementwise by transformed kernels, and transformed to
tiles of 4 x 4 of the output. The sums over the input channels make of the multiplications 36 matrix
products, one for each place in the tile, and the transforms are matrix products as well
(`kl_vae.accel.winograd`). Some rows of tiles are taken at a time, so that all that lies
between input and output stays in the cache.

On outputs of variance 1, with 512 channels, the largest error against float64 is about 1.5e-5,
where the direct convolution has 2e-6. It depends on the points at which the transforms evaluate
polynomials: with the 0, 1, -1, 2, -2 of the paper it would be 5e-5.

Here nothing has a gradient; `kl_vae.accel.convolution` puts both directions together.

B batch, C channels, O channels of the output, H and W height and width, n tiles, P products, S the
scale of the output: 1, or 2 where the map is upsampled first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from threading import local

import torch
import torch.nn.functional as F
from torch import Tensor

_KEPT = local()


def scratch(use: str, *shape: int) -> Tensor:
    """A float32 tensor on the CPU, of any content, that is valid until the next call for its `use`.

    For each thread and use the largest one so far is kept.
    """
    kept: Tensor | None = getattr(_KEPT, use, None)
    if kept is None or kept.numel() < prod(shape):
        with torch.inference_mode(False):  # then it can be used in that mode and out of it
            kept = torch.empty(prod(shape), dtype=torch.float32, device="cpu")
        setattr(_KEPT, use, kept)
    return kept[: prod(shape)].view(shape)


def matrices(points: Sequence[float], taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """B^T [P, P], G [P, taps] and A^T [4, P] of F(4, taps), for P - 1 points and infinity, float64.

    The row of B^T that belongs to a point p has the coefficients of prod (x - q) over the other
    points q, the row of G the powers of p over prod (p - q), the column of A^T the powers of p.
    """
    number = 3 + taps
    assert len(points) == number - 1
    inputs, kernel, output = (_zeros(number, columns) for columns in (number, taps, 4))
    for row, p in enumerate(points):
        others = [q for q in points if q != p]
        powers = _vector([p**k for k in range(4)])
        inputs[row, :-1] = _coefficients(others)
        kernel[row] = powers[:taps] / _vector([p - q for q in others]).prod()
        output[row] = powers
    # at infinity: the highest coefficients
    inputs[-1] = _coefficients(points)
    kernel[-1, -1] = output[-1, -1] = 1.0
    return inputs, kernel, output.t()


def _coefficients(roots: Sequence[float]) -> Tensor:
    """Of the product of x - root, lowest first."""
    polynomial, zero = _vector([1.0]), _vector([0.0])
    for root in roots:
        polynomial = torch.cat((zero, polynomial)) - root * torch.cat((polynomial, zero))
    return polynomial


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class TileTransform:
    """The matrices, float32.

    Attributes:
        inputs: [P, 36].
        kernel: [P, 9].
        output: [16, P].
        row: of the phases of an upsampled output, which its rows are: 0, or 0 and 1.
        column: the same of its columns.
    """

    inputs: Tensor
    kernel: Tensor
    output: Tensor
    row: int = 0
    column: int = 0

    @property
    def number(self) -> int:
        """P."""
        return len(self.inputs)


def of_convolution() -> tuple[TileTransform, ...]:
    """F(4x4, 3x3): P = 36 where 144 are needed directly.

    The points decide about the rounding errors; these are exact in binary.
    """
    inputs, kernel, output = matrices((0.0, 0.75, -0.75, 1.5, -1.5), taps=3)
    return (TileTransform(_twice(inputs), _twice(kernel), _twice(output)),)


def of_input_gradient() -> tuple[TileTransform, ...]:
    """Of the same with the kernel's taps in reverse: the gradient of a convolution's input."""
    return tuple(
        replace(transform, kernel=transform.kernel.flip(1)) for transform in of_convolution()
    )


def of_upsampled() -> tuple[TileTransform, ...]:
    """Of a map that is upsampled by 2 first: four, each for one of the output's four phases.

    The even rows of the output are a convolution of the map with the 2 taps (w0, w1 + w2), the odd
    ones with (w0 + w1, w2) (`kl_vae.accel.upsample` derives them), and the columns likewise. So
    each phase is an F(4x4, 2x2), P = 25.
    """
    inputs, kernel, output = matrices((0.0, 1.0, -1.0, 0.5), taps=2)
    two_of_three = [[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]
    taps = torch.tensor(two_of_three, dtype=torch.float64, device="cpu")
    window = torch.eye(6, dtype=torch.float64, device="cpu")
    seen = [inputs @ window[phase : phase + 5] for phase in (0, 1)]  # [5, 6] each
    kernels = [kernel @ taps[phase] for phase in (0, 1)]  # [5, 3] each
    return tuple(
        TileTransform(
            torch.kron(seen[row], seen[column]).float(),
            torch.kron(kernels[row], kernels[column]).float(),
            _twice(output),
            row,
            column,
        )
        for row in (0, 1)
        for column in (0, 1)
    )


def _twice(matrix: Tensor) -> Tensor:
    return torch.kron(matrix, matrix).float()


@dataclass(frozen=True)
class Piece:
    """Some rows of tiles of some images.

    Attributes:
        image: the first image.
        images: how many.
        line: the first row of tiles.
        lines: how many.
        across: tiles of a row.
    """

    image: int
    images: int
    line: int
    lines: int
    across: int

    @property
    def tiles(self) -> int:
        """N."""
        return self.images * self.lines * self.across

    def of(self, pixels: Tensor, height: int) -> Tensor:
        """Its part of a map [B, H, W, C] of which each tile has so many rows."""
        rows = slice(height * self.line, height * (self.line + self.lines))
        return pixels[self.image : self.image + self.images, rows]


def pieces(batch: int, down: int, across: int, most: int) -> Iterator[Piece]:
    """All of a batch with `down` x `across` tiles, about `most` tiles at a time, evenly."""
    images, lines = _even(batch, most // (down * across)), _even(down, most // across)
    for image in range(0, batch, images):
        for line in range(0, down, lines):
            yield Piece(image, min(images, batch - image), line, min(lines, down - line), across)


def read_tiles(
    pixels: Tensor,
    piece: Piece,
    padding: tuple[int, int],
    activation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The tiles of a piece, [36, n * C], valid until the next ones are read.

    Args:
        pixels: [B, H, W, C].
        piece: which ones.
        padding: rows of zeros above and below, columns of them at the left and right; beyond them
            zeros too make up the last tiles.
        activation: scale and shift, [B, 1, 1, C] each: of silu(scale * pixels + shift).
    """
    _, height, width, channels = pixels.shape
    images, lines, across = piece.images, piece.lines, piece.across
    padded = scratch("padded", images, 4 * lines + 2, 4 * across + 2, channels)
    top = 4 * piece.line - padding[0]  # the first row of the input that is needed
    first, last = max(top, 0), min(top + 4 * lines + 2, height)
    left, right = padding[1], padding[1] + width
    for border in (
        padded[:, : first - top],
        padded[:, last - top :],
        padded[:, :, :left],
        padded[:, :, right:],
    ):
        border.zero_()
    inside = padded[:, first - top : last - top, left:right]
    chosen = slice(piece.image, piece.image + images)
    if activation is None:
        inside.copy_(pixels[chosen, first:last])
    else:
        scale, shift = (y[chosen] for y in activation)
        F.silu(torch.mul(pixels[chosen, first:last], scale, out=inside).add_(shift), inplace=True)
    tiles = scratch("tiles", 6, 6, images, lines, across, channels)
    tiles.copy_(padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3))
    return tiles.view(36, -1)


def _even(total: int, most: int) -> int:
    """The size of parts of `total` that are about equal and have at most `most`, or 1."""
    return ceil(total / ceil(total / max(1, most)))


CONVOLUTION, INPUT_GRADIENT, UPSAMPLED = of_convolution(), of_input_gradient(), of_upsampled()

# of a piece: the cache holds their transforms, and the kernels are read often enough (measured)
TILES = 128
GRADIENT_TILES = 256  # sums [36, O, C] are read and written with each piece


def winograd_convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int] = (1, 1),
    *,
    activation: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    overwrite: bool = False,
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
        overwrite: the residual is needed no longer: its memory may become the output's.
        transforms: CONVOLUTION; INPUT_GRADIENT: x is the gradient of a convolution's output, the
            weight, [C, O, 3, 3] then, is that convolution's, and the result the gradient of its
            input; or UPSAMPLED: x is upsampled by 2, nearest, before it is convolved, and the
            padding is that of x as it is given.
    """
    batch, _, height, width = x.shape
    transposed = transforms is INPUT_GRADIENT
    out_channels = weight.shape[1 if transposed else 0]
    scale = 1 + transforms[-1].row
    rows, columns = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2  # of all tiles' middles
    down, across = ceil(rows / 4), ceil(columns / 4)  # tiles
    kernels = _transformed(weight, transforms, transposed)  # [P, C, O] each
    pixels = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    shape = (batch, out_channels, 4 * scale * down, 4 * scale * across)
    begun = overwrite and residual is not None and _lends_memory(residual, shape)
    if begun and residual is not None:
        out, residual = residual, None
    else:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    for piece in pieces(batch, down, across, TILES):
        tiles = read_tiles(pixels, piece, padding, activation)
        written = piece.of(out.permute(0, 2, 3, 1), 4 * scale)
        for transform, kernel in zip(transforms, kernels, strict=True):
            by_tile = _by_tile(written, piece, transform, scale)
            results = _products(tiles, kernel, transform, piece)
            if bias is not None:
                results.add_(bias)
            by_tile.add_(results) if begun else by_tile.copy_(results)
        if residual is not None:
            rest = piece.of(residual.permute(0, 2, 3, 1), 4 * scale)
            written[:, : rest.shape[1], : scale * columns].add_(rest)
    if shape[2:] == (scale * rows, scale * columns):
        return out  # no view, so that it may be changed in place
    out = out[:, :, : scale * rows, : scale * columns]
    return out.contiguous(memory_format=torch.channels_last)


def winograd_weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient [O, C, 3, 3] of the weight of `F.conv2d(x, weight, padding=1)`, to rounding.

    A product of a tile d of the input, the kernel g and a tile e of the gradient is
    `e * (output @ ((kernel @ g) * (inputs @ d)))`: what belongs to g is
    `kernel.T @ ((output.T @ e) * (inputs @ d))`, and the sums over the tiles are matrix products.

    Args:
        x: [B, C, H, W], in any memory format.
        gradient: of the output, [B, O, H, W].
    """
    batch, channels, height, width = x.shape
    out_channels = gradient.shape[1]
    (transform,) = CONVOLUTION
    outputs = transform.output.t().contiguous()  # [36, 16]
    down, across = ceil(height / 4), ceil(width / 4)
    pixels, errors = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    sums = scratch("sums", 36, out_channels, channels).zero_()
    for piece in pieces(batch, down, across, GRADIENT_TILES):
        n = piece.tiles
        tiles = read_tiles(pixels, piece, (1, 1))
        transformed = scratch("transformed", 36, n, channels)
        torch.mm(transform.inputs, tiles, out=transformed.flatten(1))
        of_gradient = scratch("transformed gradient", 36, n, out_channels)
        torch.mm(outputs, _quarters(errors, piece), out=of_gradient.flatten(1))
        sums.baddbmm_(of_gradient.transpose(1, 2), transformed)
    by_tap = torch.mm(sums.view(36, -1).t(), transform.kernel)  # [O * C, 9]
    return by_tap.view(out_channels, channels, 3, 3)


def _lends_memory(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.shape == shape and x.is_contiguous(memory_format=torch.channels_last)


def _transformed(
    weight: Tensor, transforms: Sequence[TileTransform], transposed: bool
) -> list[Tensor]:
    """The kernels as each transform has them, [P, C, O]; `transposed`: they are [C, O, 3, 3]."""
    numbers = [transform.number for transform in transforms]
    kernels = scratch("kernels", sum(numbers), *weight.shape[:2])
    each = torch.split(kernels, numbers)
    taps = weight.reshape(-1, 9).t()
    for transform, kernel in zip(transforms, each, strict=True):
        torch.mm(transform.kernel, taps, out=kernel.flatten(1))
    return [kernel if transposed else kernel.transpose(1, 2) for kernel in each]


def _products(tiles: Tensor, kernel: Tensor, transform: TileTransform, piece: Piece) -> Tensor:
    """Of a piece, the tiles of 4 x 4 that come out, [4, 4, images, lines, across, O]."""
    channels, out_channels = kernel.shape[1:]
    transformed = scratch("transformed", transform.number, piece.tiles, channels)
    products = scratch("products", transform.number, piece.tiles, out_channels)
    results = scratch("results", 4, 4, piece.images, piece.lines, piece.across, out_channels)
    torch.mm(transform.inputs, tiles, out=transformed.flatten(1))
    torch.bmm(transformed, kernel, out=products)
    torch.mm(transform.output, products.flatten(1), out=results.view(16, -1))
    return results


def _by_tile(written: Tensor, piece: Piece, transform: TileTransform, scale: int) -> Tensor:
    """A piece of the output as what `_products` gives of it, [4, 4, images, lines, across, O]."""
    images, lines, across = piece.images, piece.lines, piece.across
    by_phase = written.view(images, lines, 4, scale, across, 4, scale, -1)
    return by_phase[:, :, :, transform.row, :, :, transform.column].permute(2, 4, 0, 1, 3, 5)


def _quarters(pixels: Tensor, piece: Piece) -> Tensor:
    """The tiles of 4 x 4 of a piece of [B, H, W, C], [16, n * C]; beyond the map they are 0."""
    rows = piece.of(pixels, 4)
    _, height, width, channels = rows.shape
    images, lines, across = piece.images, piece.lines, piece.across
    tiles = scratch("quarters", 4, 4, images, lines, across, channels)
    by_tile = tiles.permute(2, 3, 0, 4, 1, 5)  # [images, lines, 4, across, 4, C]
    if (height, width) == (4 * lines, 4 * across):
        by_tile.copy_(rows.view(images, lines, 4, across, 4, channels))
    else:
        padded = rows.new_zeros(images, 4 * lines, 4 * across, channels)
        padded[:, :height, :width] = rows
        by_tile.copy_(padded.view(images, lines, 4, across, 4, channels))
    return tiles.view(16, -1)
