"""The same step on one rank with all threads, and on several ranks that share the threads.

Several ranks each take their part of the global batch and average their gradients by gloo, in
DistributedDataParallel, as on several GPUs or machines: what that costs shows here on one CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kl_vae.benchmark.groups import Actions, Group
from kl_vae.benchmark.plain_step import (
    PlainStep,
    build_ours,
    our_forward,
    our_optimizer,
    step_input,
)
from kl_vae.benchmark.timing import Timing, alternate
from kl_vae.ddconfig import DDConfig
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError
from kl_vae.training.prepare import wrap

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """The step that is taken.

    Attributes:
        ddconfig: the architecture.
        embed_dim: channels of the latents; None: no quant convolutions.
        size: side of the images in pixels, a multiple of f.
        global_batch_size: images a step, over all ranks.
    """

    ddconfig: DDConfig
    embed_dim: int | None
    size: int
    global_batch_size: int


@dataclass(frozen=True)
class Scaling:
    """What was measured.

    Attributes:
        ranks: number of them, where there are several.
        threads: of all ranks together.
        single: a step on one rank.
        several: a step on all ranks.
        apart: the same without exchanging gradients.
        exchange: an all-reduce of as many numbers as there are gradients, by itself.
        norm_difference: relative, of the norms of both steps' gradients.
    """

    ranks: int
    threads: int
    single: Timing
    several: Timing
    apart: Timing
    exchange: Timing
    norm_difference: float

    @property
    def speed(self) -> float:
        """How many times as fast several ranks are; 1: nothing is lost."""
        return self.single.median / self.several.median

    @property
    def exposed(self) -> float:
        """Seconds of a step that the exchange adds."""
        return max(0.0, self.several.median - self.apart.median)

    @property
    def overlap(self) -> float:
        """The part of the exchange that takes place while gradients are still computed."""
        return max(0.0, 1.0 - self.exposed / self.exchange.median)

    def markdown(self) -> str:
        """A table, and below it what follows from it."""
        each = self.threads // self.ranks
        rows = {
            f"1 rank x {_threads(self.threads)}": self.single,
            f"{self.ranks} ranks x {_threads(each)}": self.several,
            f"{self.ranks} ranks x {_threads(each)}, gradients not exchanged": self.apart,
            "an all-reduce of as many numbers, alone": self.exchange,
        }
        lines = [
            f"| {name} | {timing.cells} | {self.single.median / timing.median:.3f} |"
            for name, timing in rows.items()
        ]
        return "\n".join(
            [
                "| step | median s | low to high s | speed |",
                "|---|---|---|---|",
                *lines[:3],
                lines[3].rpartition(" | ")[0] + " | |",
                "",
                f"The exchange adds {self.exposed:.3g} s to a step; {self.overlap:.0%} of it is "
                "hidden behind the backward pass. The norms of both steps' gradients agree to "
                f"{self.norm_difference:.1e}.",
            ]
        )


def compare_scaling(job: Job, ranks: int, threads: int, repeats: int) -> Scaling:
    """Time a step of one rank and of several by turns; the others wait meanwhile.

    Args:
        job: what is done.
        ranks: 2 or more.
        threads: of all together, a multiple of `ranks`.
        repeats: how often each is timed.

    Raises:
        RunError: a process ended, or its gradients are not those of the other step.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare = partial(_actions, job)
        single = stack.enter_context(Group(1, threads, prepare, folder / "single"))
        several = stack.enter_context(Group(ranks, threads // ranks, prepare, folder / "several"))
        norms = [group.do("norm")[0] for group in (single, several)]
        difference = abs(norms[1] / norms[0] - 1.0)
        if not difference < 1e-3:
            raise RunError(
                f"the gradients of {ranks} ranks have another norm than those of one, by "
                f"{difference:.1e} of it: times of different things do not compare"
            )
        candidates: dict[str, Callable[[], object]] = {
            "single": lambda: single.do("step"),
            "several": lambda: several.do("step"),
            "apart": lambda: several.do("apart"),
            "exchange": lambda: several.do("exchange"),
        }
        timings = alternate(candidates, repeats, CPU)
    return Scaling(ranks, threads, **timings, norm_difference=difference)


def _actions(job: Job, ranks: Ranks) -> Actions:
    """What a rank can be asked for; each gives a number."""
    model = build_ours(job.ddconfig, job.embed_dim, CPU)
    module, _ = wrap(model, ranks)
    step = PlainStep(our_forward(module), our_optimizer(model), CPU)
    everything = step_input(job.ddconfig, job.embed_dim, job.global_batch_size, job.size, CPU)
    images, noise = (x.chunk(ranks.world_size)[ranks.rank].contiguous() for x in everything)
    numbers = torch.zeros(sum(p.numel() for p in model.parameters()))

    def take_step() -> float:
        step(images, noise)
        return 0.0

    def take_step_apart() -> float:
        assert isinstance(module, DistributedDataParallel)
        with module.no_sync():
            return take_step()

    def exchange() -> float:
        dist.all_reduce(numbers)
        return 0.0

    def norm() -> float:
        step.loss(images, noise).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found = nn.utils.get_total_norm(gradients).item()
        step.optimizer.zero_grad(set_to_none=True)
        return found

    return {"step": take_step, "apart": take_step_apart, "exchange": exchange, "norm": norm}


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"
