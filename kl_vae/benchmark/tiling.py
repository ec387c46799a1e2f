"""Memory and time against size: whole and in strips, ours and diffusers'."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from kl_vae.accel.accelerate import accelerate
from kl_vae.benchmark.peak import Cost, cost_of
from kl_vae.benchmark.plots import matplotlib_figure, save_figure
from kl_vae.ddconfig import DDConfig
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.errors import RunError
from kl_vae.runtime.randomness import generator_for

logger = logging.getLogger(__name__)

What = Literal["decode", "encode"]
WHATS: tuple[What, ...] = get_args(What)
WHOLE, EXACT = "whole", "exact"
DIFFUSERS, TILED = "diffusers, whole", "diffusers, tiled"
WAYS = (WHOLE, EXACT, DIFFUSERS, TILED)
TILE = 512  # pixels, of diffusers' tiles; their overlap is a quarter


@dataclass(frozen=True)
class Measured:
    """One way at one size.

    Attributes:
        what: encode or decode.
        way: one of the names above.
        width: of the image, pixels.
        height: of the image, pixels.
        seconds: of each repeat.
        peak: bytes of the whole process at most.
        added: bytes of them that the call added to what the process held before.
        difference: largest absolute one to our whole result: of moments, or of images in [-1, 1];
            None: there is none.
    """

    what: What
    way: str
    width: int
    height: int
    seconds: tuple[float, ...]
    peak: int
    added: int
    difference: float | None


def measure(
    ddconfig: DDConfig,
    embed_dim: int | None,
    device: torch.device,
    sizes: Sequence[tuple[int, int]],
    repeats: int,
    precision: str = "fp32",
    whats: Sequence[What] = WHATS,
    ways: Sequence[str] = WAYS,
) -> Iterator[Measured]:
    """Measure ways at every size (width, height), by turns, each call in its own process.

    The weights are random and the same for all. `whole` is always tried; without diffusers its two
    ways are left out, and with a warning what the memory does not suffice for.

    Raises:
        ValueError: safetensors is not installed, or diffusers' ways cannot be had of this model.
    """
    theirs = () if find_spec("diffusers") is not None else (DIFFUSERS, TILED)
    ways = [way for way in WAYS if way == WHOLE or (way in ways and way not in theirs)]
    model = AutoEncoderKL(ddconfig, embed_dim)
    f, channels = model.downsampling_factor, model.latent_channels
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_compvis(folder / "model.safetensors")
        if not {DIFFUSERS, TILED}.isdisjoint(ways):
            model.save_pretrained(folder / "diffusers")
        del model
        for width, height in sizes:
            shapes: dict[What, tuple[int, ...]] = {
                "decode": (1, channels, height // f, width // f),
                "encode": (1, ddconfig.in_channels, height, width),
            }
            for what in whats:
                shape = shapes[what]
                costs: dict[str, list[Cost]] = {way: [] for way in ways}
                for repeat in range(repeats):
                    for way in ways[repeat % len(ways) :] + ways[: repeat % len(ways)]:
                        call = partial(_prepare, folder, what, way, shape, str(device), precision)
                        try:
                            if way in costs:
                                costs[way].append(cost_of(call, device, torch.get_num_threads()))
                        except RunError as error:
                            del costs[way]
                            about = f"{what} {width} x {height}, {way}"
                            logger.warning("%s: left out: %s", about, error)
                expected = _result(folder, WHOLE) if WHOLE in costs else None
                for way, each in costs.items():
                    yield Measured(
                        what,
                        way,
                        width,
                        height,
                        tuple(cost.seconds for cost in each),
                        max(cost.peak for cost in each),
                        max(cost.peak - cost.before for cost in each),
                        None
                        if expected is None
                        else (_result(folder, way) - expected).abs().max().item(),
                    )


def table(measured: Sequence[Measured]) -> str:
    """Markdown: a row a way and size, with ratios to ours and to diffusers' whole result."""
    lines = [
        "| | size | way | seconds | of whole | peak, GB | of whole | of diffusers | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in measured:
        alike = {x.way: x for x in measured if _key(x) == _key(m)}
        whole, theirs = alike.get(WHOLE), alike.get(DIFFUSERS)
        cells = [
            m.what,
            f"{m.width} x {m.height}",
            m.way,
            f"{statistics.median(m.seconds):.3g}",
            "" if whole is None else f"{_seconds_ratio(m, whole):.2f}",
            f"{m.peak / 1e9:.2f}",
            "" if whole is None else f"{m.peak / whole.peak:.2f}",
            "" if theirs is None else f"{m.peak / theirs.peak:.2f}",
            "" if m.difference is None else f"{m.difference:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(measured: Sequence[Measured], path: Path, machine: str) -> None:
    """Draw memory and time against the pixels, both axes logarithmic.

    Raises:
        ValueError: matplotlib is not installed, or the file cannot be written.
    """
    Figure = matplotlib_figure()  # noqa: N806 - a class
    figure = Figure(figsize=(11, 8), layout="constrained")
    whats = list(dict.fromkeys(m.what for m in measured))
    axes = figure.subplots(2, len(whats), sharex=True, squeeze=False)
    values: tuple[tuple[str, Callable[[Measured], float]], ...] = (
        ("peak memory of the process, GB", lambda m: m.peak / 1e9),
        ("seconds", lambda m: statistics.median(m.seconds)),
    )
    for row, (label, value) in zip(axes, values, strict=True):
        for axis, what in zip(row, whats, strict=True):
            for way in dict.fromkeys(m.way for m in measured):
                points = [m for m in measured if (m.what, m.way) == (what, way)]
                megapixels = [m.width * m.height / 1e6 for m in points]
                axis.loglog(megapixels, [value(m) for m in points], marker="o", label=way)
            axis.set_title(what)
            axis.set_ylabel(label)
            axis.set_xlabel("megapixels")
            axis.grid(True, which="both", alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(machine, fontsize="small")
    save_figure(figure, path)


def _key(m: Measured) -> tuple[str, int, int]:
    return m.what, m.width, m.height


def _seconds_ratio(m: Measured, other: Measured) -> float:
    return statistics.median(m.seconds) / statistics.median(other.seconds)


def _result(folder: Path, way: str) -> Tensor:
    result: Tensor = torch.load(folder / f"{way}.pt", weights_only=True)
    return result


def _prepare(
    folder: Path, what: What, way: str, shape: tuple[int, ...], device: str, precision: str
) -> Callable[[], None]:
    """In the process that measures: load the model and make the input."""
    from kl_vae.runtime.device import autocast

    x = torch.randn(shape, generator=generator_for("benchmark", *shape)).to(device)
    if what == "encode":
        x = x.clamp(-1.0, 1.0)
    compute = (_theirs if way in (DIFFUSERS, TILED) else _ours)(folder, what, way, device)

    def call() -> None:
        with torch.inference_mode(), autocast(torch.device(device), precision):
            result = compute(x)
        torch.save(result.float().cpu().clone(), folder / f"{way}.pt")

    return call


def _ours(folder: Path, what: What, way: str, device: str) -> Callable[[Tensor], Tensor]:
    from kl_vae.inference.tiling import Tiling, decode_tiled, encode_tiled

    model = accelerate(AutoEncoderKL.from_checkpoint(folder / "model.safetensors").to(device))
    tiling = Tiling(mode="whole" if way == WHOLE else "exact")
    if what == "encode":
        return lambda x: encode_tiled(model, x, tiling).parameters
    return lambda x: decode_tiled(model, x, tiling)


def _theirs(folder: Path, what: What, way: str, device: str) -> Callable[[Tensor], Tensor]:
    from diffusers import AutoencoderKL

    model = (
        AutoencoderKL.from_pretrained(folder / "diffusers", low_cpu_mem_usage=False)
        .to(device)
        .eval()
    )
    if way == TILED:
        model.enable_tiling()
        model.tile_sample_min_size = TILE
        model.tile_latent_min_size = TILE // 2 ** (len(model.config.block_out_channels) - 1)
    if what == "encode":
        return lambda x: model.encode(x).latent_dist.parameters
    return lambda x: model.decode(x).sample
