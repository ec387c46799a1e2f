"""One rank: a few steps of Muon on gradients that are the same on all; each writes what it has.

Arguments: the folder to write to, the number of steps, and perhaps a file to go on from.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from kl_vae.optim.muon import Muon
from kl_vae.runtime.distributed import connect

# more kernels of one shape than ranks, fewer, and of a group with a single one
SHAPES = ((8, 4, 3, 3), (8, 4, 3, 3), (12, 1, 2, 2), (36, 8), (8, 4, 3, 3), (16, 8, 3, 3), (5, 5))
WITHOUT_GRADIENT = 4

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
with connect("cpu") as ranks:
    torch.manual_seed(0)
    kernels = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    head, bias = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8))
    optimizer = Muon(
        [
            {"params": kernels, "lr": 0.02, "weight_decay": 0.1, "orthogonalize": True},
            {"params": [head], "lr": 0.02, "orthogonalize": True},
            {"params": [bias], "lr": 1e-3},
        ]
    )
    parameters, start = [*kernels, head, bias], 0
    if len(sys.argv) > 3:
        content = torch.load(sys.argv[3], weights_only=True)
        optimizer.load_state_dict(content["optimizer"])
        start = content["step"]
        for p, value in zip(parameters, content["parameters"], strict=True):
            p.data.copy_(value)
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(parameters):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if i == WITHOUT_GRADIENT else gradient
        optimizer.step()
    content = {
        "parameters": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "step": start + steps,
    }
    torch.save(content, folder / f"{ranks.world_size}_{ranks.rank}.pt")
