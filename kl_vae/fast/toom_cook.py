"""The matrices of short convolutions that multiply as little as possible.

Toom (1963), Cook (1966); the form is that of Winograd (1980) and of Lavin & Gray (2016): with 6
multiplications, A^T [(G g) * (B^T d)] is the convolution of 6 values d with 3 taps g, 4 values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def matrices(points: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """B^T [6, 6], G [6, 3] and A^T [4, 6] of F(4, 3), for 5 points and infinity, in float64.

    The row of B^T that belongs to a point p has the coefficients of prod (x - q) over the other
    points q, the row of G the powers of p over prod (p - q), the column of A^T the powers of p.
    """
    inputs, kernel, output = (_zeros(6, columns) for columns in (6, 3, 4))
    for row, p in enumerate(points):
        others = [q for q in points if q != p]
        powers = _vector([p**k for k in range(4)])
        inputs[row, :5] = _coefficients(others)
        kernel[row] = powers[:3] / _vector([p - q for q in others]).prod()
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
