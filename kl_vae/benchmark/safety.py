"""What it costs a healthy run to be ready for faults."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch

from kl_vae.benchmark.gan_step import build_step
from kl_vae.benchmark.timing import Timing, alternate
from kl_vae.checkpoints.checkpoint import FORMAT
from kl_vae.data import Batch
from kl_vae.ddconfig import DDConfig
from kl_vae.runtime.distributed import Ranks, check_agreement
from kl_vae.runtime.randomness import generator_for
from kl_vae.training.checkpoints import Checkpoints
from kl_vae.training.config import TrainingConfig
from kl_vae.training.guards import Seen, which_to_take
from kl_vae.training.state import TrainingState


@dataclass(frozen=True)
class SafetyCost:
    """What was measured: a GAN step, each guard with how often it is called, and a plain save.

    Attributes:
        ranks: processes that step together.
        step: a whole GAN step, its guards included.
        guards: by name, the seconds of a call and in how many steps there is one.
        plain_save: `torch.save` of the same content, which is what a save costs without guards.
    """

    ranks: int
    step: Timing
    guards: dict[str, tuple[Timing, int]]
    plain_save: Timing

    def share(self, name: str) -> float:
        """The part of a step's time that a guard takes on average; of saves what guards add."""
        timing, every = self.guards[name]
        plain = self.plain_save.median if name == SAVE else 0.0
        return max(0.0, timing.median - plain) / every / self.step.median

    @property
    def total(self) -> float:
        """The part of a step's time that all guards take together."""
        return sum(map(self.share, self.guards))

    def markdown(self) -> str:
        """A table, and below it what it means."""
        rows = [
            f"| {name} | {timing.cells} | {every} | {self.share(name):.4%} |"
            for name, (timing, every) in self.guards.items()
        ]
        return "\n".join(
            [
                "| guard | median s | low to high s | once in steps | of a step |",
                "|---|---|---|---|---|",
                *rows,
                f"| all | | | | {self.total:.4%} |",
                "",
                f"A step takes {self.step.median:.4g} s; ranks: {self.ranks}. Of a save the share "
                f"is what it takes beyond a plain torch.save, {self.plain_save.median:.4g} s.",
            ]
        )


CALLS = 50  # of a guard at once: ranks that come late to the first are not its cost
SAVE = "a save: finite, flushed, renamed, sha256"


def measure_safety(
    ddconfig: DDConfig,
    embed_dim: int | None,
    ranks: Ranks,
    *,
    size: int = 128,
    batch_size: int = 1,
    repeats: int = 5,
) -> SafetyCost:
    """Time a GAN step and each guard by turns, on random weights; all ranks call this.

    Args:
        ddconfig: the architecture.
        embed_dim: channels of the latents; None: no quant convolutions.
        ranks: among which the guards agree.
        size: side of the images in pixels, a multiple of f.
        batch_size: images a step and rank.
        repeats: calls of each that are timed.
    """
    device, defaults = ranks.device, TrainingConfig(max_steps=1)
    take_step = build_step(ddconfig, embed_dim, device, batch_size)
    take_step.ranks = ranks
    state = take_step.state
    generator = generator_for("benchmark", size)
    images = torch.rand(batch_size, ddconfig.in_channels, size, size, generator=generator)
    names = ("-",) * batch_size
    batch = Batch(2.0 * images - 1.0, torch.arange(batch_size), names, ())
    take_step(repeat(batch))  # the optimisers' states are there to be saved
    loss, norms = torch.zeros((), device=device), [torch.ones((), device=device)] * 2

    def agree_on_finiteness() -> None:
        seen, guards = [Seen(loss, names, ())], (ranks, state.skips, take_step.bad_images)
        for _ in range(CALLS):
            taken = which_to_take(state.updaters, norms, seen, *guards, 0, max_skipped_steps=1)
            assert all(taken)

    def ask_for_signals() -> None:
        for _ in range(CALLS):
            ranks.any(False)

    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = Checkpoints(Path(folder), state, keep=2, resumed=None)

        def save() -> None:
            state.step += 1  # each its own file, as in a run
            ranks.on_first(checkpoints.save)

        candidates = {
            "step": lambda: take_step(repeat(batch)),
            "finite": agree_on_finiteness,
            "signal": ask_for_signals,
            "agreement": lambda: check_agreement(state.model, ranks, 0),
            "save": save,
            "plain": lambda: ranks.on_first(lambda: _save_plainly(Path(folder), state)),
        }
        timings = alternate(candidates, repeats, device)
    check_every = defaults.check_ranks_every_steps
    assert check_every is not None
    guards = {
        "losses and gradients finite on all ranks": (timings["finite"].divided(CALLS), 1),
        "a signal on any rank": (timings["signal"].divided(CALLS), 1),
        "the same parameters on all ranks": (timings["agreement"], check_every),
        SAVE: (timings["save"], defaults.save_every_steps),
    }
    return SafetyCost(ranks.world_size, timings["step"], guards, timings["plain"])


def _save_plainly(folder: Path, state: TrainingState) -> None:
    torch.save({"format": FORMAT, **state.content()}, folder / "plain.pt")
