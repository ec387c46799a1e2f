"""How much memory is free, as Linux says it, and errors that say it is not."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from kl_vae.runtime.memory import (
    free_memory,
    free_on_host,
    give_back_memory,
    is_out_of_memory,
)

CPU = torch.device("cpu")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MACHINE = {"proc/meminfo": "MemTotal:  9000 kB\n\nMemAvailable:   8000 kB\nHugePages_Free: 0\n"}


def test_a_machine_without_limits(tmp_path: Path) -> None:
    write(tmp_path, MACHINE)
    assert free_on_host(tmp_path) == 8000 * 1024


def test_another_system(tmp_path: Path) -> None:
    assert free_on_host(tmp_path) is None


def test_a_limit_of_version_2_on_this_group_or_one_above_it(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user/job"
    write(tmp_path, MACHINE)
    write(tmp_path, {"proc/self/cgroup": "4:memory:/other\n0::/user/job\n"})
    write(tmp_path, {f"{group}/memory.max": "max\n", f"{group}/memory.current": "5000\n"})
    assert free_on_host(tmp_path) == 8000 * 1024
    above = "sys/fs/cgroup/user"
    write(tmp_path, {f"{above}/memory.max": "9000\n", f"{above}/memory.current": "6000\n"})
    assert free_on_host(tmp_path) == 3000
    write(tmp_path, {f"{above}/memory.stat": "anon 1\ninactive_file 500\n"})  # is given back
    assert free_on_host(tmp_path) == 3500
    write(tmp_path, {f"{group}/memory.max": "4000\n"})
    assert free_on_host(tmp_path) == 0


def test_a_limit_of_version_1_seen_from_within_a_container(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    write(tmp_path, MACHINE)
    write(tmp_path, {"proc/self/cgroup": "5:cpu,memory:/docker/1\n0::/\n"})
    write(
        tmp_path,
        {f"{group}/memory.limit_in_bytes": "7000", f"{group}/memory.usage_in_bytes": "1000"},
    )
    assert free_on_host(tmp_path) == 6000


def test_processes_of_one_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = free_memory(CPU)
    assert alone is not None and shared is not None
    assert shared < alone / 2


def test_an_unknown_device() -> None:
    assert free_memory(torch.device("meta")) is None


def test_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not is_out_of_memory(RuntimeError("the sizes must match"))


def test_give_back_memory() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("only glibc keeps it")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tensors = [torch.ones(25_000) for _ in range(2000)]  # 200 MB
    del tensors[::2]
    before = resident()
    give_back_memory(torch.device("cpu"))
    assert before - resident() > 60e6
    give_back_memory(torch.device("meta"))  # other devices have allocators of their own
