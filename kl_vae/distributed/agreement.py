"""Whether all ranks hold the same parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kl_vae.distributed.ranks import Ranks
from kl_vae.errors import RunError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def check_agreement(module: nn.Module, ranks: Ranks, step: int) -> None:
    """Compare the bits of every parameter with those of rank 0; all ranks call this.

    It reads each parameter once and sends one number a tensor. Buffers are left out: of batch
    norms without synchronisation they are each rank's own.

    Raises:
        RunError: naming the first parameter that differs, and where.
    """
    if ranks.world_size == 1:
        return
    names = [name for name, _ in module.named_parameters()]
    sums = torch.tensor(ranks.gather(checksums(module)))  # [rank, parameter]
    differing = (sums != sums[0]).any(dim=0).nonzero().flatten().tolist()
    if differing:
        first = differing[0]
        others = (sums[:, first] != sums[0, first]).nonzero().flatten().tolist()
        raise RunError(
            f"step {step}: {len(differing)} of {len(names)} parameters differ between the ranks, "
            f"{names[first]} first, on rank {', '.join(map(str, others))}: use the same torch and "
            "the same kind of device on all machines; the same command goes on from the last "
            "checkpoint"
        )


@torch.no_grad()
def checksums(module: nn.Module) -> list[int]:
    """A number for each parameter, of all its bits."""
    return torch.stack([_checksum(p) for p in module.parameters()]).tolist()


def _checksum(x: Tensor) -> Tensor:
    """The sum of the bits of all elements as integers, an int64 scalar."""
    return x.detach().view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64)
