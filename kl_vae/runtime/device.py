"""The device to compute on, and its precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(
    name: str = "auto", local_rank: int = 0, local_world_size: int = 1
) -> torch.device:
    """Return the device called `name`; `auto`: cuda, else mps, else cpu.

    Args:
        name: auto, cuda, mps, cpu, or one GPU such as cuda:1.
        local_rank: which GPU of this machine `auto` and `cuda` mean.
        local_world_size: number of ranks on this machine.

    Raises:
        ValueError: this machine has no such device, or several ranks would use one GPU.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and (kind != "cuda" or not index.isdigit())):
        raise ValueError(f"device {name!r}: choose one of {', '.join(DEVICES)}, or cuda:INDEX")
    if index and local_world_size > 1:
        raise ValueError(
            f"device {name}: all {local_world_size} ranks of this machine would use this GPU; give "
            "cuda, and choose the GPUs with CUDA_VISIBLE_DEVICES"
        )
    if kind in ("auto", "cuda") and torch.cuda.is_available():
        number = int(index) if index else local_rank
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"device cuda:{number}: this machine has {torch.cuda.device_count()} GPUs; "
                "start as many processes as there are GPUs (torchrun --nproc-per-node)"
            )
        return torch.device("cuda", number)
    if kind in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if kind in ("auto", "cpu"):
        return torch.device("cpu")
    raise ValueError(f"device {name}: not available here; choose cpu, or leave it out")


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Allow only kernels whose results are the same in every run, if `enabled`.

    An operation without such a kernel is a RuntimeError that names it.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return the context that casts to bf16 or fp16 on `device`; fp32 casts nothing."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")
