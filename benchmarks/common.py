"""What the benchmarks share: arguments, models, timing, peak memory and the report.

Shapes: B batch, C channels, H and W the image's height and width, z latent channels, h = H / f,
w = W / f.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.runtime.config_file import load_model_params
from kl_vae.runtime.memory import give_back_memory
from kl_vae.runtime.randomness import generator_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- arguments ----


def argument_parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="kl-f8", help="config file or name (default: kl-f8)")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help=f"timed calls of each (default: {repeats})"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"cpu, cuda or mps (default: {device})")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; set the threads, and make `device` a torch.device."""
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give 1 or more")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: give a file in a folder that exists")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.device = torch.device(args.device)
    return args


# ---- models and inputs ----


class Architecture(NamedTuple):
    """`ddconfig` and `embed_dim` of a config, without dropout."""

    ddconfig: dict[str, Any]
    embed_dim: int | None

    @classmethod
    def of(cls, config: str) -> Architecture:
        """Read a config file, or a shipped config by its name."""
        params = load_model_params(config)
        return cls({**params["ddconfig"], "dropout": 0.0}, params["embed_dim"])

    def build(self, lossconfig: Mapping[str, Any] | None = None) -> AutoEncoderKL:
        """Build our model with random weights, the same at each call."""
        torch.manual_seed(0)
        scale = {"scale_factor": 1.0}  # of the latents, which diffusers' config states
        return AutoEncoderKL(self.ddconfig, self.embed_dim, lossconfig, latents=scale)


def reference_model(model: AutoEncoderKL) -> Any:
    """Return diffusers' AutoencoderKL with the weights of ours, on the same device."""
    from diffusers import AutoencoderKL

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder, "diffusers"))
        reference = AutoencoderKL.from_pretrained(
            Path(folder, "diffusers"), low_cpu_mem_usage=False
        )
    return reference.to(model.get_last_layer().device)


def random_images(model: AutoEncoderKL, batch: int, size: int) -> Tensor:
    """Return uniform noise as images [B, C, size, size] in [-1, 1], the same at each call."""
    shape = (batch, model.config.in_channels, size, size)
    images = torch.rand(shape, generator=generator_for("benchmark", batch, size))
    return (2.0 * images - 1.0).to(model.get_last_layer().device)


def random_latents(model: AutoEncoderKL, batch: int, size: int) -> Tensor:
    """Return normal noise as the latents [B, z, h, w] of images of `size`, as `random_images`."""
    f = model.downsampling_factor
    shape = (batch, model.latent_channels, size // f, size // f)
    z = torch.randn(shape, generator=generator_for("benchmark", *shape))
    return z.to(model.get_last_layer().device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of fp32 (none), bf16 or fp16."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def check_difference(difference: float, bound: float, variant: str) -> None:
    """Raise RuntimeError where a difference is above its bound, or NaN."""
    if not difference <= bound:
        raise RuntimeError(
            f"{variant}: differs by {difference:.1e}, which is more than rounding ({bound:.0e}); "
            "times of different computations do not compare"
        )


# ---- timing ----


class Timing(NamedTuple):
    """Seconds of a call over its repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise at least one duration."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def alternate(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Time each call `repeats` times, interleaved, after one untimed call of each.

    What else the machine does strikes all alike. Each round begins with the next call, so that none
    always follows the same one. On a GPU a duration ends when the work has finished.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in rotated(list(calls), repeat):
            gc.collect()  # the garbage of the call before is not this one's to collect
            synchronize(device)
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(each) for name, each in seconds.items()}


def rotated(names: Sequence[str], by: int) -> list[str]:
    """Return the names with another one first: [b, c, a] of [a, b, c] by 1."""
    first = by % len(names)
    return [*names[first:], *names[:first]]


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ---- peak memory ----


class Cost(NamedTuple):
    """What a call took: seconds, and bytes before it and at most (the GPU's, else the process')."""

    seconds: float
    before: int
    peak: int


def cost_of(prepare: Callable[[], Callable[[], object]], device: torch.device) -> Cost:
    """Measure, in a new process, the call that `prepare` returns.

    The largest memory of a process never falls, so that each call needs a process of its own.

    Args:
        prepare: load what the call needs; picklable, such as a `partial` of a module's function.
        device: what the call computes on.

    Raises:
        RuntimeError: the call failed, or its process was killed, mostly for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure, args=(prepare, device, torch.get_num_threads(), sending)
    )
    process.start()
    sending.close()
    try:
        answer: Cost | str = receiving.recv()
    except EOFError:
        answer = "its process was killed, mostly for want of memory; give smaller images"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"a measurement failed: {answer}")
    return answer


def costs_of(
    prepares: Mapping[str, Callable[[], Callable[[], object]]], repeats: int, device: torch.device
) -> dict[str, list[Cost]]:
    """Measure each `repeats` times, interleaved; leave out, with a line, what memory denies."""
    costs: dict[str, list[Cost]] = {name: [] for name in prepares}
    for repeat in range(repeats):
        for name in rotated(list(prepares), repeat):
            if name not in costs:
                continue
            try:
                costs[name].append(cost_of(prepares[name], device))
            except RuntimeError as error:
                del costs[name]
                print(f"{name}: left out: {error}", file=sys.stderr)
    return costs


def _measure(
    prepare: Callable[[], Callable[[], object]],
    device: torch.device,
    threads: int,
    connection: Connection,
) -> None:
    try:
        torch.set_num_threads(threads)
        call = prepare()
        give_back_memory(device)
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_peak()
        before = torch.cuda.memory_allocated(device) if on_cuda else _process_memory("VmRSS")
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(device) if on_cuda else _process_memory("VmHWM")
        connection.send(Cost(seconds, before, peak))
    except Exception as error:  # the parent says it in one line
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _reset_peak() -> None:
    """Let VmHWM start anew (proc(5), Linux): loading may have taken more than the call."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _process_memory(key: str) -> int:
    """Return bytes of this process: `VmRSS` now, `VmHWM` at most (the latter outside of Linux)."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(rf"^{key}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        assert found is not None
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# ---- report ----


def describe_machine(device: torch.device) -> str:
    """Return one line: the processor and what torch uses of it, the GPU if used, and torch."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    processor = name[1].strip() if name else platform.processor() or platform.machine()
    threads, kind = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    parts = [f"{processor} ({threads} thread{'s' if threads > 1 else ''}, {kind})"]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join([*parts, f"torch {torch.__version__}"])


def markdown_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table.

    Args:
        columns: heading -> format of a cell from a row's values, such as "{median:.3g}".
        rows: values by name; a cell whose value is None stays empty.
    """

    def cell(template: str, row: Mapping[str, Any]) -> str:
        try:
            return template.format(**row)
        except TypeError:  # None has no format
            return ""

    lines = [[*columns], ["---"] * len(columns)]
    lines += [[cell(template, row) for template in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(
    args: argparse.Namespace,
    heading: str,
    columns: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> None:
    """Print heading, table, notes and machine; write them as JSON where `args.json` says."""
    machine = describe_machine(args.device)
    table = markdown_table(columns, rows)
    print("\n\n".join([f"{heading}.", table, *notes, f"Measured on {machine}."]))
    if args.json is not None:
        arguments = {key: value for key, value in vars(args).items() if key != "json"}
        content = {"arguments": arguments, "machine": machine, "rows": rows, "notes": notes}
        args.json.write_text(json.dumps(content, indent=2, default=str) + "\n")
