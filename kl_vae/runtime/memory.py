"""Free memory of a device, and out-of-memory errors."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path, PurePosixPath

import torch

_C_LIBRARY = ctypes.CDLL(None) if os.name == "posix" else None

# where cgroup version 2 and 1 keep limit and usage, and what of the usage the kernel gives back
_CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still allocate on `device`; None: not known.

    On the CPU that is what the machine has available or what the cgroup's limit leaves, whichever
    is less, divided among the processes that torchrun started on this machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + cached
    if device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        return max(0, free)
    if device.type == "cpu":
        available = free_on_host(Path("/"))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return None if available is None else available // max(1, processes)
    return None


def free_on_host(root: Path) -> int | None:
    """Bytes that /proc and /sys below `root` say are free; None: no Linux's there."""
    machine = _table(root / "proc/meminfo").get("MemAvailable")
    if machine is None:
        return None
    left = [machine * 1024]  # meminfo counts in KiB
    for folder, limit, usage, reclaimable in _CGROUPS:
        for group in _groups(root, folder):
            most, used = _number(group / limit), _number(group / usage)
            if most is None or used is None:
                continue  # "max": no limit
            used -= _table(group / "memory.stat").get(reclaimable, 0)
            left.append(max(0, most - used))
    return min(left)


def give_back_memory(device: torch.device) -> None:
    """Return free CPU memory to the system; glibc would keep it."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None) if device.type == "cpu" else None
    if trim is not None:
        trim(0)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a RuntimeError is an out-of-memory error; only CUDA's has its own type."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        "out of memory" in text or "allocate memory" in text or "not enough memory" in text
    )


def _groups(root: Path, folder: str) -> list[Path]:
    """This process's cgroup and those above it, as far as they are seen from here."""
    version_2 = folder == "sys/fs/cgroup"
    own = PurePosixPath("/")
    for line in _read(root / "proc/self/cgroup").splitlines():
        # hierarchy:controllers:path, of version 2 with no controllers
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "" if version_2 else "memory" in controllers.split(","):
            own = PurePosixPath("/", path)
    return [root / folder / str(group).lstrip("/") for group in (own, *own.parents)]


def _table(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable: 123 kB` or `inactive_file 123`."""
    table = {}
    for line in _read(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdigit():
            table[words[0]] = int(words[1])
    return table


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""  # missing or not readable
