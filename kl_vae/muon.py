"""Muon: momentum whose matrices are orthogonalised, and AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# of the odd quintic whose iteration drives singular values towards 1 (Jordan et al. 2024)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    The kernel of a convolution is taken as the matrix [out, in * kh * kw]. Its Nesterov momentum is
    replaced by the nearest matrix with orthonormal rows or columns, so that every direction is
    learned at the same rate, and scaled by sqrt(max(1, rows / columns)).

    Args:
        groups: parameter groups, each with `lr`. With `orthogonalize=True` all its parameters
            have 2 dimensions or more.
        momentum: of the orthogonalised parameters.
        betas: of AdamW, for the groups without `orthogonalize`.
        eps: of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
    ) -> None:
        defaults = {"momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, {**defaults, "orthogonalize": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["orthogonalize"] else self._adamw
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                    update(p, p.grad, group)
        return loss

    def _muon(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"]
        momentum.lerp_(gradient, 1.0 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"])  # Nesterov
        rows, columns = p.shape[0], p[0].numel()
        update = orthogonalize(direction.reshape(rows, columns)).reshape(p.shape)
        p.sub_(update, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _adamw(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(gradient, 1.0 - beta1)
        state["square"].lerp_(gradient.square(), 1.0 - beta2)
        mean = state["mean"] / (1.0 - beta1 ** state["step"])
        square = state["square"] / (1.0 - beta2 ** state["step"])
        p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows (or columns, where there are fewer).

    Singular values of [rows, columns] come to lie within 0.7 to 1.2, which is enough.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram: Tensor = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.T if matrix.shape[0] > matrix.shape[1] else x
    return out
