"""What a measurement was made on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")  # Linux alone


def describe_machine(device: torch.device, cpuinfo: Path = CPUINFO) -> str:
    """One line: the processor, what torch uses of it, the GPU where it is used, and torch."""
    threads, kind = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    parts = [f"{_processor(cpuinfo)} ({threads} thread{'s' if threads > 1 else ''}, {kind})"]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    elif device.type != "cpu":
        parts.append(device.type)
    return ", ".join([*parts, f"torch {torch.__version__}"])


def _processor(cpuinfo: Path) -> str:
    """The processor's name; where the system tells none, its architecture."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
