"""What a measurement was made on."""

import platform
from pathlib import Path

import pytest
import torch

from kl_vae.benchmark.machine import describe_machine

CPU = torch.device("cpu")


def test_the_processor_is_named_as_the_system_names_it(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel\t: 85\nmodel name\t: Fast CPU @ 2 GHz\nmodel name\t: x"
    )
    threads = torch.get_num_threads()
    used = f"{threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"
    line = f"Fast CPU @ 2 GHz ({used}), torch {torch.__version__}"
    assert describe_machine(CPU, cpuinfo) == line


def test_without_a_name_it_is_the_architecture(tmp_path: Path) -> None:
    empty = tmp_path / "cpuinfo"
    empty.write_text("processor\t: 0\n")
    for cpuinfo in (empty, tmp_path / "none"):
        line = describe_machine(CPU, cpuinfo)
        assert line.startswith(platform.processor() or platform.machine())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_named_where_it_is_used() -> None:
    assert torch.cuda.get_device_name() in describe_machine(torch.device("cuda", 0))
    assert torch.cuda.get_device_name() not in describe_machine(CPU)
