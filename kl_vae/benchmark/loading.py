"""What it takes to read a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kl_vae.benchmark.timing import Timing, alternate
from kl_vae.ddconfig import DDConfig
from kl_vae.model import AutoEncoderKL

BASELINE = "`safetensors.torch.load_file` and `load_state_dict` into a model that is there"


@dataclass(frozen=True)
class LoadingResult:
    """How long each way took, by name; the first is what the others are compared with."""

    timings: dict[str, Timing]
    megabytes: float

    @property
    def ratios(self) -> dict[str, float]:
        """The medians against the first."""
        first = self.timings[BASELINE].median
        return {name: timing.median / first for name, timing in self.timings.items()}

    def markdown(self) -> str:
        """A table."""
        rows = [
            f"| {name} | {timing.cells} | {self.ratios[name]:.2f} |"
            for name, timing in self.timings.items()
        ]
        return "\n".join(["| | s | lowest to highest | ratio |", "|---|---|---|---|", *rows])


def compare_loading(
    ddconfig: DDConfig, embed_dim: int | None, device: torch.device, repeats: int
) -> LoadingResult:
    """Read random weights from files of each layout, and use each weight once, by a sum.

    The files have just been written: the system holds them in memory, and what is measured is what
    is done with them. `from_checkpoint` builds the model as well, which the baseline has already.

    Raises:
        ValueError: safetensors is not installed.
    """
    model = AutoEncoderKL(ddconfig, embed_dim).to(device)
    with tempfile.TemporaryDirectory() as name:
        files = {
            "a CompVis file": Path(name, "compvis.safetensors"),
            "a folder of diffusers'": Path(name, "diffusers"),
            "a .ckpt of torch's": Path(name, "model.ckpt"),
        }
        compvis, diffusers, ckpt = files.values()
        model.save_compvis(compvis)
        model.save_pretrained(diffusers)
        torch.save({"state_dict": model.state_dict()}, ckpt)

        from safetensors.torch import load_file

        def baseline() -> None:
            model.load_state_dict(load_file(compvis))
            _use(model)

        def ours(path: Path) -> None:
            _use(AutoEncoderKL.from_checkpoint(path).to(device))

        candidates: dict[str, Callable[[], object]] = {BASELINE: baseline}
        for kind, path in files.items():
            candidates[f"`from_checkpoint` of {kind}"] = partial(ours, path)
        timings = alternate(candidates, repeats, device)
        megabytes = compvis.stat().st_size / 1e6
    return LoadingResult(timings, megabytes)


@torch.no_grad()
def _use(model: AutoEncoderKL) -> None:
    """Read every weight: those that are mapped are read only then."""
    for parameter in model.parameters():
        parameter.sum()
