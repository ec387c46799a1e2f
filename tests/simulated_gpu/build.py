"""Build the libraries of simulated GPUs, and the environment of a process that uses them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = (HERE / "runtime.cpp", HERE / "libraries.cpp")
TORCH_LIBRARIES = ("libtorch_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")


def why_not() -> str | None:
    """Return why this machine cannot simulate a GPU; None: it can."""
    missing = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if _headers() is None:
        return "the headers of CUDA's runtime are not installed"
    return None


def build(folder: Path) -> Path:
    """Compile the library into `folder` and return its path; it takes about 10 s."""
    rest = folder / "no_operations.cpp"
    rest.write_text(_no_operations())
    library = folder / "libsimulated_gpu.so"
    command = [
        "g++",
        "-O1",
        "-w",
        "-fPIC",
        "-shared",
        "-Wl,-soname,libcuda.so.1",
        f"-I{_headers()}",
    ]
    subprocess.run([*command, *map(str, SOURCES), str(rest), "-o", str(library)], check=True)
    return library


def environment(library: Path, gpus: int) -> dict[str, str]:
    """Return what to add to the environment of a process, for torch to find `gpus` of them."""
    return {
        "LD_PRELOAD": str(library),
        "SIMULATED_GPUS": str(gpus),
        "TORCH_DISABLE_NATIVE_JIT": "1",  # Triton, which needs a driver
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # new memory is zero, reused memory would not be
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",  # which need a driver
    }


def _headers() -> Path | None:
    """Return the folder of cuda_runtime_api.h, which torch's dependencies contain."""
    packages = Path(torch.__file__).parent.parent
    found = [*packages.glob("triton/backends/nvidia/include/cuda_runtime_api.h")]
    found += packages.glob("nvidia/*/include/cuda_runtime_api.h")
    return found[0].parent if found else None


def _no_operations() -> str:
    """Return functions without an effect for all others that torch wants of CUDA's libraries."""
    defined = set(re.findall(r"\b(\w+)\(", "".join(path.read_text() for path in SOURCES)))
    wanted: set[str] = set()
    for name in TORCH_LIBRARIES:
        path = Path(torch.__file__).parent / "lib" / name
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True
        )
        wanted |= set(re.findall(r" U ((?:__cuda|cuda|cublas|nccl)[A-Z]\w*)", symbols.stdout))
    functions = "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(wanted - defined))
    return f'extern "C" {{\n{functions}}}\n'
