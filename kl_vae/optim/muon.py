"""Muon: orthogonalised momentum for matrices, and AdamW for the other parameters.

A stack is a list of n parameters whose matrices have equal shapes: [n, rows, columns].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# coefficients of the odd quintic iteration that maps singular values towards 1 (Jordan et al. 2024)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Five iterations in two rounds, each with a new Gram matrix. A Gram matrix squares the singular
# values, and rounding errors of small ones would grow over five iterations of a single round to a
# relative error of 1e-3 in float32, and 0.5 with TF32. With two rounds the result is as accurate as
# without Gram matrices (1e-4, and about 1e-2 with TF32). In bf16, training
# reached a lower PSNR with two of three seeds (docs/development/performance.md).
NEWTON_SCHULZ_ROUNDS = (3, 2)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate the nearest matrices with orthonormal rows (or columns, if there are fewer).

    The result has the shape of `matrices`, [n, rows, columns], and is float32, also under autocast.
    Singular values are mapped to 0.67 to 1.21; those below 1/600 of the Frobenius norm of their
    matrix may be smaller, and 0 stays 0.

    An iteration is X <- P X with P = a I + b G + c G^2, G = X X^T. P and G commute, so that several
    iterations are one product of the matrices P, [r, r], with X, [r, c], and G <- P G P updates G.
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
    """Return the product of P over `iterations`, starting from G; both [n, r, r]."""
    product = p = _factor(gram)
    for _ in range(iterations - 1):
        gram = p @ gram @ p
        p = _factor(gram)
        product = p @ product
    return product


def _factor(gram: Tensor) -> Tensor:
    """Return P = a I + b G + c G^2 of the Gram matrices G; both [n, r, r]."""
    a, b, c = NEWTON_SCHULZ
    p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    p.diagonal(dim1=-2, dim2=-1).add_(a)
    return p


# Maximum size of a stack on the CPU: 64 MiB of float32, or one matrix if larger. Other devices
# take all matrices of a shape at once, with one kernel for each operation.
STACK_VALUES = 2**24

Stack = list[Tensor]  # of parameters: torch._foreach_* do not accept list[nn.Parameter] as type


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    A convolution kernel is treated as a matrix [out, in * kh * kw]. Its Nesterov momentum is
    replaced by the nearest matrix with orthonormal rows or columns, so that all directions are
    learned at the same rate, and scaled by sqrt(max(1, rows / columns)).

    If torch.distributed is initialised, each rank orthogonalises a share of the matrices and all
    ranks exchange the results, each value once. Parameters stay bit-identical across ranks if
    gradients are, as with DDP. Each rank stores the whole state, so that the number of ranks may
    change. Parameters without gradient are not updated; they must be the same on all ranks.

    Args:
        groups: parameter groups, each with `lr`. All parameters of a group with
            `orthogonalize=True` must have at least 2 dimensions and, with several ranks, be on one
            device.
        momentum: momentum of the orthogonalised parameters.
        betas: betas of AdamW, for groups without `orthogonalize`.
        eps: eps of AdamW.
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
        """Perform one optimisation step, without device synchronisation."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            update = self._muon if group["orthogonalize"] else self._adamw
            update(parameters, group)
        return loss

    def _muon(self, parameters: Stack, group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        torch._foreach_lerp_(
            self._states(parameters, "momentum"), _gradients(parameters), 1.0 - group["momentum"]
        )
        distributed = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        shares = assign(parameters, world_size)
        updates: Iterator[Tensor] = (
            orthogonalize(self._directions(stack, group["momentum"])) for stack in shares[rank]
        )
        if world_size > 1:
            updates = exchange(updates, shares, rank)
        for stack, update in zip(chain.from_iterable(shares), updates, strict=True):
            rows, columns = _matrix_shape(stack[0])
            update = update.to(stack[0].dtype)
            torch._foreach_add_(
                stack,
                [u.reshape(p.shape) for u, p in zip(update, stack, strict=True)],
                alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5,
            )

    def _directions(self, stack: Stack, momentum: float) -> Tensor:
        """Return the Nesterov momentum of a stack, [n, rows, columns]."""
        directions = torch._foreach_lerp(
            _gradients(stack), self._states(stack, "momentum"), momentum
        )
        return torch.stack([x.reshape(_matrix_shape(x)) for x in directions])

    def _adamw(self, parameters: Stack, group: dict[str, Any]) -> None:
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
        steps = [self.state[p]["step"] for p in parameters]
        means, squares = self._states(parameters, "mean"), self._states(parameters, "square")
        gradients = _gradients(parameters)
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(means, gradients, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, [(1.0 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(divisors, group["eps"])
        rates = [-group["lr"] / (1.0 - beta1**step) for step in steps]
        torch._foreach_addcdiv_(parameters, means, divisors, rates)

    def _states(self, parameters: Stack, key: str) -> list[Tensor]:
        return [self.state[p][key] for p in parameters]


def assign(parameters: Iterable[Tensor], world_size: int) -> list[list[Stack]]:
    """Return the stacks that each rank orthogonalises, the same on all ranks.

    A stack holds matrices of one shape: on the CPU at most STACK_VALUES values, or one matrix.
    Matrices are assigned from the most to the least expensive, each to the rank with the least work
    so far.
    """
    loads = [0] * world_size
    shares: list[dict[Any, Stack]] = [{} for _ in range(world_size)]
    for p in sorted(parameters, key=_cost, reverse=True):  # equal costs keep their order
        rank = loads.index(min(loads))
        loads[rank] += _cost(p)
        key = (_matrix_shape(p), p.dtype, p.device)
        shares[rank].setdefault(key, []).append(p)
    return [[part for stack in share.values() for part in _parts(stack)] for share in shares]


def exchange(updates: Iterable[Tensor], shares: list[list[Stack]], rank: int) -> Iterator[Tensor]:
    """Send this rank's updates, [n, rows, columns] each, to all ranks; yield those of all ranks.

    The order is that of `shares`. Each rank receives one float32 per value of the matrices.
    """
    sizes = [sum(p.numel() for stack in share for p in stack) for share in shares]
    device = next(stack[0].device for share in shares for stack in share)
    everything = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    parts = list(torch.split(everything, sizes))
    start = 0
    for update in updates:
        parts[rank][start : start + update.numel()].view(update.shape).copy_(update)
        start += update.numel()
    if device.type == "cuda":
        dist.all_gather(parts, parts[rank])
    else:  # Gloo gathers equal sizes only
        pending = [dist.broadcast(part, src, async_op=True) for src, part in enumerate(parts)]
        for work in pending:
            assert work is not None, "this process is in the group"
            work.wait()
    start = 0
    for stack in chain.from_iterable(shares):
        shape = (len(stack), *_matrix_shape(stack[0]))
        yield everything[start : start + len(stack) * stack[0].numel()].view(shape)
        start += len(stack) * stack[0].numel()


def _gradients(parameters: Stack) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _matrix_shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.numel() // x.shape[0]


def _cost(x: Tensor) -> int:
    """Return the number of multiplications of `orthogonalize`."""
    r, c = sorted(_matrix_shape(x))
    rounds, iterations = len(NEWTON_SCHULZ_ROUNDS), sum(NEWTON_SCHULZ_ROUNDS)
    # per round G and the product with X; per iteration P, and P G P and P P after the first one
    return 2 * rounds * r * r * c + (iterations + 3 * (iterations - rounds)) * r**3


def _parts(stack: Stack) -> Iterator[Stack]:
    size = len(stack)
    if stack[0].device.type == "cpu":
        size = max(1, STACK_VALUES // stack[0].numel())
    return (stack[start : start + size] for start in range(0, len(stack), size))
