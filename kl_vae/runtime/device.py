"""The device to compute on, and its precision."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

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


@contextmanager
def gpu_settings(device: torch.device, *, fixed_sizes: bool, deterministic: bool) -> Iterator[None]:
    """Choose PyTorch's faster settings for a GPU, log them, and restore the former ones at the end.

    - Matrix products in float32 use TF32, as convolutions do, unless cuDNN's TF32 is disabled.
    - cuDNN measures which algorithm is the fastest for each convolution, if sizes are fixed (it
      measures each new size) and runs need not have the same results.
    - Memory segments can grow, if sizes vary; a user's `PYTORCH_CUDA_ALLOC_CONF` prevails.

    Args:
        device: of the run; nothing is set on others than GPUs.
        fixed_sizes: whether the images of all steps have one size.
        deterministic: whether every run must have the same results.
    """
    if device.type != "cuda":
        yield
        return
    chosen = ["pinned memory"]  # of `copy_to_device` and of data loaders
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    if torch.backends.cudnn.allow_tf32 and precision == "highest":
        torch.set_float32_matmul_precision("high")
        chosen.append("float32_matmul_precision=high")
    if fixed_sizes and not deterministic:
        torch.backends.cudnn.benchmark = True
        chosen.append("cudnn.benchmark")
    growing = not fixed_sizes and sys.platform == "linux" and not _ALLOCATOR & os.environ.keys()
    if growing:
        _set_allocator("expandable_segments:True")
        chosen.append("expandable_segments")
    logger.info("settings   %s", ", ".join(chosen))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
        if growing:
            _set_allocator("expandable_segments:False")


_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}


def _set_allocator(settings: str) -> None:
    # later versions of torch deprecate the second name
    new = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (new or torch.cuda.memory._set_allocator_settings)(settings)


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device; to a GPU without waiting, by way of pinned memory."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the CPU in float64; those that share a device are copied at once."""
    copies = [torch.empty(0)] * len(tensors)
    for device in {x.device for x in tensors}:
        indices = [i for i, x in enumerate(tensors) if x.device == device]
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS has not
        together = torch.cat([tensors[i].detach().flatten().to(dtype) for i in indices])
        parts = torch.split(together.cpu().double(), [tensors[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            copies[i] = part.view(tensors[i].shape)
    return copies


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return the context that casts to bf16 or fp16 on `device`; fp32 casts nothing."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")
