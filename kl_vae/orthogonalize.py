"""Orthogonalise stacks of matrices by Newton and Schulz's iteration, mostly in their Gram matrices.

n matrices in a stack, r and c the shorter and the longer side of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

# of the odd quintic whose iteration drives singular values towards 1 (Jordan et al. 2024)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Five iterations in two rounds, each from a Gram matrix of its own. That squares the singular
# values, and the rounding of the small ones would grow through all five iterations of one round: to
# 1e-3 of the result in float32, to half of it where TF32 is allowed. With two rounds the result is
# as exact as without Gram matrices (1e-4, and about 1e-2 with TF32).
NEWTON_SCHULZ_ROUNDS = (3, 2)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About the nearest matrices with orthonormal rows (or columns, where there are fewer).

    [n, rows, columns] -> the same in float32, whatever autocast says. Singular values come to lie
    within 0.67 to 1.21, which is enough; those below 1/600 of the matrix's Frobenius norm may stay
    smaller, and 0 stays 0.

    An iteration is X <- P X with P = a I + b G + c G^2, G = X X^T. P and G commute, so that several
    iterations are one product of the P's, [r, r], with X, [r, c], while G <- P G P keeps up with X.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    with torch.autocast(matrices.device.type, enabled=False):
        x = (matrices.mT if tall else matrices).float()  # [n, r, c]
        x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
        for iterations in NEWTON_SCHULZ_ROUNDS:
            x = _iterate(x @ x.mT, iterations) @ x
        out: Tensor = x.mT if tall else x
    return out


def _iterate(gram: Tensor, iterations: int) -> Tensor:
    """The product of the P's of `iterations`, from the first one's G; both [n, r, r]."""
    product = p = _factor(gram)
    for _ in range(iterations - 1):
        gram = p @ gram @ p
        p = _factor(gram)
        product = p @ product
    return product


def _factor(gram: Tensor) -> Tensor:
    """P = a I + b G + c G^2 of the Gram matrices G; both [n, r, r]."""
    a, b, c = NEWTON_SCHULZ
    p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    p.diagonal(dim1=-2, dim2=-1).add_(a)
    return p
