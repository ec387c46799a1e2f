"""What a tile of 6 x 6 of a map becomes by a 3 x 3 convolution, as three matrices.

A tile d of the input, flattened, and a kernel g give `output @ ((kernel @ g) * (inputs @ d))`, a
tile of 4 x 4 of the output, where * is elementwise: what stands left and right of a tile in Lavin &
Gray's A^T [(G g G^T) * (B^T d B)] A is one Kronecker product.

P products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kl_vae.fast.toom_cook import matrices


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
    ones with (w0 + w1, w2) (`kl_vae.fast.upsample` derives them), and the columns likewise. So each
    phase is an F(4x4, 2x2), P = 25.
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
