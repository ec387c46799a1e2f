"""One rank: `BatchNormOverRanks` on its share of a batch; each rank writes the results.

CUDA's kernels are replaced by their definitions, since the CPU has none of them.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from kl_vae.losses.batch_norm import BatchNormOverRanks
from kl_vae.runtime.distributed import connect

OVER = (0, 2, 3)


def per_channel(x: Tensor) -> Tensor:
    return x[:, None, None]


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.mean(OVER), (x.var(OVER, correction=0) + eps).rsqrt()


def gather_stats(  # type: ignore[no-untyped-def]
    x, means, deviations, running_mean, running_var, momentum, eps, counts
) -> tuple[Tensor, Tensor]:
    share = (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    var = (share * (deviations**-2 - eps + (means - mean).square())).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (var + eps).rsqrt()


def elementwise(x, weight, bias, mean, deviation, eps) -> Tensor:  # type: ignore[no-untyped-def]
    normalized = (x - per_channel(mean)) * per_channel(deviation)
    return normalized * per_channel(weight) + per_channel(bias)


def backward_reduce(g, x, mean, deviation, weight, *needed: bool) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    products = (g * (x - per_channel(mean))).sum(OVER)
    return g.sum(OVER), products, products * deviation, g.sum(OVER)


def backward_elementwise(g, x, mean, deviation, weight, sums, products, counts) -> Tensor:  # type: ignore[no-untyped-def]
    centered = (x - per_channel(mean)) * per_channel(deviation**2 * products / counts.sum())
    return (g - per_channel(sums / counts.sum()) - centered) * per_channel(deviation * weight)


torch.batch_norm_stats = stats
torch.batch_norm_gather_stats_with_counts = gather_stats
torch.batch_norm_elemt = elementwise
torch.batch_norm_backward_reduce = backward_reduce
torch.batch_norm_backward_elemt = backward_elementwise

with connect("cpu") as ranks:
    content: dict[str, Any] = torch.load("batch.pt", weights_only=True)
    norm = BatchNormOverRanks(3).double()
    norm.load_state_dict(content["state"])
    x, gradient = (content[key].chunk(ranks.world_size)[ranks.rank] for key in ("x", "gradient"))
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(gradient)
    assert norm.weight.grad is not None and norm.bias.grad is not None
    results = {"out": out.detach(), "x": x.grad, "state": norm.state_dict()}
    results |= {"weight": norm.weight.grad, "bias": norm.bias.grad}
    torch.save(results, f"{sys.argv[1]}_{ranks.rank}.pt")
