"""3 x 3 convolutions and their gradients with a quarter of the multiplications, on CPUs in float32.

Lavin & Gray 2016, "Fast algorithms for convolutional neural networks", F(4x4, 3x3): input tiles of
6 x 6 are transformed, multiplied elementwise by transformed kernels, and transformed to output
tiles of 4 x 4. With the sum over input channels, the multiplications become 36 matrix products, one
for each position in the tile; the transforms are matrix products as well. A few rows of tiles are
processed at a time, so that all intermediate results stay in the cache.

For outputs of variance 1 and 512 channels, the largest error against float64 is about 1.5e-5,
compared with 2e-6 for direct convolution. It depends on the points at which the transforms evaluate
polynomials: with 0, 1, -1, 2, -2 as in the paper it would be 5e-5.

These functions are not differentiable; `kl_vae.accel.convolution` combines them for autograd.

Shapes: B batch, C input channels, O output channels, H and W height and width, n tiles, P products,
S scale of the output: 1, or 2 if the input is upsampled first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from threading import local

import torch
import torch.nn.functional as F
from torch import Tensor

_BUFFERS = local()


def scratch(use: str, *shape: int) -> Tensor:
    """Return an uninitialised float32 CPU tensor, valid until the next call with the same `use`.

    The largest buffer so far is kept for each thread and use.
    """
    buffer: Tensor | None = getattr(_BUFFERS, use, None)
    if buffer is None or buffer.numel() < prod(shape):
        with torch.inference_mode(False):  # usable inside and outside inference mode
            buffer = torch.empty(prod(shape), dtype=torch.float32, device="cpu")
        setattr(_BUFFERS, use, buffer)
    return buffer[: prod(shape)].view(shape)


def matrices(points: Sequence[float], taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return B^T [P, P], G [P, taps] and A^T [4, P] of F(4, taps), float64.

    They are for P - 1 finite points and infinity. For a point p, the row of B^T contains the
    coefficients of prod (x - q) over all other points q, the row of G the powers of p divided by
    prod (p - q), and the column of A^T the powers of p.
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
    # the point at infinity selects the highest coefficients
    inputs[-1] = _coefficients(points)
    kernel[-1, -1] = output[-1, -1] = 1.0
    return inputs, kernel, output.t()


def _coefficients(roots: Sequence[float]) -> Tensor:
    """Return the coefficients of prod (x - root), lowest order first."""
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
    """Transform matrices for two-dimensional tiles, float32.

    Attributes:
        inputs: transform of input tiles, [P, 36].
        kernel: transform of kernels, [P, 9].
        output: transform to output tiles, [16, P].
        row: for upsampled outputs, parity of the output rows: 0 or 1.
        column: for upsampled outputs, parity of the output columns: 0 or 1.
    """

    inputs: Tensor
    kernel: Tensor
    output: Tensor
    row: int = 0
    column: int = 0

    @property
    def number(self) -> int:
        """Number of products P."""
        return len(self.inputs)


def of_convolution() -> tuple[TileTransform, ...]:
    """Return the transform of F(4x4, 3x3): P = 36 products, where direct convolution needs 144.

    The points determine the rounding error; these are exact in binary.
    """
    inputs, kernel, output = matrices((0.0, 0.75, -0.75, 1.5, -1.5), taps=3)
    return (TileTransform(_twice(inputs), _twice(kernel), _twice(output)),)


def of_input_gradient() -> tuple[TileTransform, ...]:
    """Return the transform for the gradient of a convolution's input, with reversed taps."""
    return tuple(
        replace(transform, kernel=transform.kernel.flip(1)) for transform in of_convolution()
    )


def of_upsampled() -> tuple[TileTransform, ...]:
    """Return the transforms for an input that is upsampled by 2, one for each output phase.

    The even output rows are a convolution of the input with the 2 taps (w0, w1 + w2), the odd rows
    with (w0 + w1, w2) (derived in `kl_vae.accel.upsample`), and likewise for columns. Each of the
    four phases is an F(4x4, 2x2) with P = 25.
    """
    inputs, kernel, output = matrices((0.0, 1.0, -1.0, 0.5), taps=2)
    two_of_three = [[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]
    taps = torch.tensor(two_of_three, dtype=torch.float64, device="cpu")
    window = torch.eye(6, dtype=torch.float64, device="cpu")
    input_transforms = [inputs @ window[phase : phase + 5] for phase in (0, 1)]  # [5, 6] each
    kernels = [kernel @ taps[phase] for phase in (0, 1)]  # [5, 3] each
    return tuple(
        TileTransform(
            torch.kron(input_transforms[row], input_transforms[column]).float(),
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
    """Range of tile rows of a range of images.

    Attributes:
        image: the first image.
        images: number of images.
        line: the first row of tiles.
        lines: number of rows of tiles.
        across: number of tiles per row.
    """

    image: int
    images: int
    line: int
    lines: int
    across: int

    @property
    def tiles(self) -> int:
        """Number of tiles n."""
        return self.images * self.lines * self.across

    def of(self, pixels: Tensor, height: int) -> Tensor:
        """Return this piece of a feature map [B, H, W, C] whose tiles have `height` rows."""
        rows = slice(height * self.line, height * (self.line + self.lines))
        return pixels[self.image : self.image + self.images, rows]


def pieces(batch: int, down: int, across: int, most: int) -> Iterator[Piece]:
    """Split a batch of `down` x `across` tiles evenly into pieces of about `most` tiles."""
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
    """Return the input tiles of a piece, [36, n * C], valid until the next call.

    Args:
        pixels: feature map [B, H, W, C].
        piece: the piece to read.
        padding: rows of zeros at the top and bottom, columns of zeros at the left and right; the
            last tiles are filled up with zeros.
        activation: scale and shift, [B, 1, 1, C] each; if given, read silu(scale * pixels + shift).
    """
    _, height, width, channels = pixels.shape
    images, lines, across = piece.images, piece.lines, piece.across
    padded = scratch("padded", images, 4 * lines + 2, 4 * across + 2, channels)
    start = 4 * piece.line - padding[0]  # first row of the input, may be negative
    first, last = max(start, 0), min(start + 4 * lines + 2, height)
    left, right = padding[1], padding[1] + width
    for border in (
        padded[:, : first - start],
        padded[:, last - start :],
        padded[:, :, :left],
        padded[:, :, right:],
    ):
        border.zero_()
    inside = padded[:, first - start : last - start, left:right]
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
    """Return the size, at most `most` but at least 1, of equal parts of `total`."""
    return ceil(total / ceil(total / max(1, most)))


CONVOLUTION, INPUT_GRADIENT, UPSAMPLED = of_convolution(), of_input_gradient(), of_upsampled()

# tiles per piece (measured): few enough for the cache, and enough to amortise reading the kernels
TILES = 128
GRADIENT_TILES = 256  # larger, since each piece reads and writes the sums [36, O, C]


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
    """Compute `F.conv2d(x, weight, bias, padding=padding)` in channels_last, up to rounding.

    Args:
        x: [B, C, H, W], in any memory format.
        weight: [O, C, 3, 3].
        bias: [O] or None.
        padding: rows of zeros at the top and bottom, columns of zeros at the left and right.
        activation: scale and shift, [B, 1, 1, C] each; if given, convolve silu(scale * x + shift).
        residual: tensor of the output's shape to add to the output.
        overwrite: the output may reuse the memory of the residual.
        transforms: CONVOLUTION; INPUT_GRADIENT: x is the gradient of a convolution's output, the
            weight [C, O, 3, 3] is that of the convolution, and the result is the gradient of its
            input; or UPSAMPLED: x is upsampled by 2 (nearest) before the convolution, and padding
            applies to x before upsampling.
    """
    batch, _, height, width = x.shape
    transposed = transforms is INPUT_GRADIENT
    out_channels = weight.shape[1 if transposed else 0]
    scale = 1 + transforms[-1].row
    rows, columns = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2  # unscaled output size
    down, across = ceil(rows / 4), ceil(columns / 4)  # tiles
    kernels = _transformed(weight, transforms, transposed)  # [P, C, O] each
    pixels = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    shape = (batch, out_channels, 4 * scale * down, 4 * scale * across)
    accumulates = overwrite and residual is not None and _lends_memory(residual, shape)
    if accumulates and residual is not None:
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
            by_tile.add_(results) if accumulates else by_tile.copy_(results)
        if residual is not None:
            rest = piece.of(residual.permute(0, 2, 3, 1), 4 * scale)
            written[:, : rest.shape[1], : scale * columns].add_(rest)
    if shape[2:] == (scale * rows, scale * columns):
        return out  # not a view, so that callers may modify it in place
    out = out[:, :, : scale * rows, : scale * columns]
    return out.contiguous(memory_format=torch.channels_last)


def winograd_weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Compute the weight gradient [O, C, 3, 3] of `F.conv2d(x, weight, padding=1)`, up to rounding.

    For an input tile d, the kernel g and a tile e of the output gradient, the product is
    `e * (output @ ((kernel @ g) * (inputs @ d)))`. Its gradient with respect to g is
    `kernel.T @ ((output.T @ e) * (inputs @ d))`, whose sums over tiles are matrix products.

    Args:
        x: [B, C, H, W], in any memory format.
        gradient: gradient of the output, [B, O, H, W].
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
        transformed_gradient = scratch("transformed gradient", 36, n, out_channels)
        torch.mm(outputs, _quarters(errors, piece), out=transformed_gradient.flatten(1))
        sums.baddbmm_(transformed_gradient.transpose(1, 2), transformed)
    by_tap = torch.mm(sums.view(36, -1).t(), transform.kernel)  # [O * C, 9]
    return by_tap.view(out_channels, channels, 3, 3)


def _lends_memory(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.shape == shape and x.is_contiguous(memory_format=torch.channels_last)


def _transformed(
    weight: Tensor, transforms: Sequence[TileTransform], transposed: bool
) -> list[Tensor]:
    """Return the transformed kernels, [P, C, O] for each transform.

    The weight is [O, C, 3, 3] or, if `transposed`, [C, O, 3, 3].
    """
    numbers = [transform.number for transform in transforms]
    kernels = scratch("kernels", sum(numbers), *weight.shape[:2])
    each = torch.split(kernels, numbers)
    taps = weight.reshape(-1, 9).t()
    for transform, kernel in zip(transforms, each, strict=True):
        torch.mm(transform.kernel, taps, out=kernel.flatten(1))
    return [kernel if transposed else kernel.transpose(1, 2) for kernel in each]


def _products(tiles: Tensor, kernel: Tensor, transform: TileTransform, piece: Piece) -> Tensor:
    """Compute the 4 x 4 output tiles of a piece, [4, 4, images, lines, across, O]."""
    channels, out_channels = kernel.shape[1:]
    transformed = scratch("transformed", transform.number, piece.tiles, channels)
    products = scratch("products", transform.number, piece.tiles, out_channels)
    results = scratch("results", 4, 4, piece.images, piece.lines, piece.across, out_channels)
    torch.mm(transform.inputs, tiles, out=transformed.flatten(1))
    torch.bmm(transformed, kernel, out=products)
    torch.mm(transform.output, products.flatten(1), out=results.view(16, -1))
    return results


def _by_tile(written: Tensor, piece: Piece, transform: TileTransform, scale: int) -> Tensor:
    """View a piece of the output in the shape of `_products`, [4, 4, images, lines, across, O]."""
    images, lines, across = piece.images, piece.lines, piece.across
    by_phase = written.view(images, lines, 4, scale, across, 4, scale, -1)
    return by_phase[:, :, :, transform.row, :, :, transform.column].permute(2, 4, 0, 1, 3, 5)


def _quarters(pixels: Tensor, piece: Piece) -> Tensor:
    """Return the 4 x 4 tiles, [16, n * C], of a piece of [B, H, W, C], filled up with zeros."""
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
