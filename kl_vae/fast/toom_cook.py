"""The matrices of short convolutions that multiply as little as possible.

Toom (1963), Cook (1966); the form is that of Winograd (1980) and of Lavin & Gray (2016): F(4, r),
which gives 4 values of the convolution of 3 + r values d with r taps g, is A^T [(G g) * (B^T d)]
with as many multiplications as there are values d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
