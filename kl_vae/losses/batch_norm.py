"""Batch norm over all GPUs of a run, [B, C, H, W] -> [B, C, H, W]; R ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchNormOverRanks(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of all ranks, on GPUs.

    It computes what `nn.SyncBatchNorm` does with the same kernels, but the host waits for nothing:
    every rank has images, so that none has to be left out.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        out: Tensor = _Normalize.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )
        return out


def synchronize_batch_norms(module: nn.Module) -> None:
    """Turn each `nn.BatchNorm2d` of a module into a `BatchNormOverRanks`, in place."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = BatchNormOverRanks


class _Normalize(torch.autograd.Function):
    """Normalisation with the statistics of all ranks, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = _dense(x)
        mean, deviation = torch.batch_norm_stats(x, eps)  # [C] each, the inverse of the deviation
        count = mean.new_full((1,), x.numel() // x.shape[1])
        own = torch.cat([mean, deviation, count])  # [2C + 1]
        every = own.new_empty(dist.get_world_size() * len(own))
        # renamed in torch 2.14, where the old name warns
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(every, own)
        sizes = [len(mean), len(mean), 1]
        means, deviations, counts = torch.split(every.view(-1, len(own)), sizes, dim=1)
        mean, deviation = torch.batch_norm_gather_stats_with_counts(
            x,
            means.contiguous(),
            deviations.contiguous(),
            running_mean,
            running_var,
            momentum,
            eps,
            counts.flatten().contiguous(),
        )
        ctx.save_for_backward(x, weight, mean, deviation, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, deviation, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _dense(gradients[0])
        x, weight, mean, deviation, counts = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sum_g, sum_gx, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            gradient, x, mean, deviation, weight, needs_x, needs_weight, needs_bias
        )
        x_gradient = None
        if needs_x:
            sums = torch.cat([sum_g, sum_gx])  # [2C]
            dist.all_reduce(sums)
            sum_g, sum_gx = sums.chunk(2)
            x_gradient = torch.batch_norm_backward_elemt(
                gradient, x, mean, deviation, weight, sum_g, sum_gx, counts
            )
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    """Return x [B, C, H, W] in a layout that the kernels accept: channels last or contiguous."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
