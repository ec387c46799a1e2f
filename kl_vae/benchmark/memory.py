"""The most memory that encoding, decoding and a training step take, ours and diffusers'.

B batch, C channels, H and W the image's height and width, z latent channels, h and w the latents'
height and width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kl_vae.benchmark.flops import Work
from kl_vae.benchmark.inference import DIFFUSERS, coder, coding_input, their_ways, ways
from kl_vae.benchmark.peak import Cost, cost_of
from kl_vae.benchmark.plain_step import (
    RATE,
    STEP_WAYS,
    PlainStep,
    build_way,
    our_forward,
    our_optimizer,
    step_input,
    their_forward,
)
from kl_vae.benchmark.timing import Timing
from kl_vae.benchmark.twin import build_twin, why_no_twin
from kl_vae.ddconfig import DDConfig
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.errors import RunError

logger = logging.getLogger(__name__)

CHECKPOINTED = f"{DIFFUSERS}, gradient checkpointing"
THEIR_STEP_WAYS = (DIFFUSERS, CHECKPOINTED)


@dataclass(frozen=True)
class Memory:
    """What one way to do a piece of work took, each call in a process of its own.

    Attributes:
        work: encode, decode or step.
        way: whose modules, and how they are arranged.
        batch_size: images a call.
        size: side of the images in pixels.
        timing: of the calls.
        peak: bytes that were in use at most: of the GPU, else of the process, with Python, torch,
            and diffusers where it is used.
        added: bytes of them that came with the call, beyond weights, input, and of a step the
            optimiser's state.
    """

    work: Work
    way: str
    batch_size: int
    size: int
    timing: Timing
    peak: int
    added: int


def measure_memory(
    ddconfig: DDConfig,
    embed_dim: int | None,
    device: torch.device,
    work: Work,
    *,
    size: int,
    batch_size: int = 1,
    repeats: int = 1,
    precision: str = "fp32",
) -> Iterator[Memory]:
    """Measure all ways of a piece of work by turns; diffusers' plain modules are the first.

    The weights are random. Encoding and decoding are first calls; a step is a second one, so that
    the optimiser's state is there before it. What the memory does not suffice for is left out, with
    a warning.
    """
    names = list(STEP_WAYS if work == "step" else ways(device))
    if why_no_twin(ddconfig, embed_dim) is None:
        theirs = THEIR_STEP_WAYS if work == "step" else tuple(their_ways(precision))
        names = [*theirs, *names]
    prepare = _prepare_step if work == "step" else partial(_prepare_coding, work)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            if name not in costs:
                continue
            call = partial(
                prepare, name, ddconfig, embed_dim, size, batch_size, str(device), precision
            )
            try:
                costs[name].append(cost_of(call, device, torch.get_num_threads()))
            except RunError as error:
                del costs[name]
                logger.warning("%s %d x %d, %s: left out: %s", work, size, size, name, error)
    for name, each in costs.items():
        yield Memory(
            work,
            name,
            batch_size,
            size,
            Timing.of([cost.seconds for cost in each]),
            max(cost.peak for cost in each),
            max(cost.peak - cost.before for cost in each),
        )


def table(measured: Sequence[Memory]) -> str:
    """Markdown: a row each, with its parts of what the first way with the same work takes."""
    lines = [
        "| | images | way | peak, GB | of first | added, GB | of first | median s | of first |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in measured:
        key = (m.work, m.batch_size, m.size)
        first = next(x for x in measured if (x.work, x.batch_size, x.size) == key)
        cells = [
            m.work,
            f"{m.batch_size} x {m.size} x {m.size}",
            m.way,
            f"{m.peak / 1e9:.2f}",
            f"{m.peak / first.peak:.2f}",
            f"{m.added / 1e9:.2f}",
            f"{m.added / first.added:.2f}",
            f"{m.timing.median:.3g}",
            f"{m.timing.median / first.timing.median:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Peak: of the GPU's memory, or of the whole process. Added: of that by the call, beyond "
        "weights, input and, of a step, the optimiser's state. Each call is in a process of its "
        "own; times of encode and decode are of first calls.",
    ]
    return "\n".join(lines)


def figures(measured: Sequence[Memory]) -> list[dict[str, Any]]:
    """Plain values."""
    return [dataclasses.asdict(m) for m in measured]


def _prepare_coding(
    work: Any,
    way: str,
    ddconfig: DDConfig,
    embed_dim: int | None,
    size: int,
    batch_size: int,
    device_name: str,
    precision: str,
) -> Callable[[], object]:
    """In the process that measures: make the module and its input."""
    device = torch.device(device_name)
    own = ways(device)
    if way in own:
        module = own[way](AutoEncoderKL(ddconfig, embed_dim).eval().to(device))
    else:
        module = their_ways(precision)[way](build_twin(ddconfig, embed_dim).to(device))
    side, channels = size, ddconfig.in_channels
    if work == "decode":
        side = size // ddconfig.downsampling_factor
        channels = ddconfig.z_channels if embed_dim is None else embed_dim
    x = coding_input(work, (batch_size, channels, side, side)).to(device)
    return partial(coder(module, work, device, precision), x)


def _prepare_step(
    way: str,
    ddconfig: DDConfig,
    embed_dim: int | None,
    size: int,
    batch_size: int,
    device_name: str,
    precision: str,
) -> Callable[[], object]:
    """In the process that measures: make the step, and take the first."""
    device = torch.device(device_name)
    if way in THEIR_STEP_WAYS:
        twin = build_twin(ddconfig, embed_dim).to(device).train()
        if way == CHECKPOINTED:
            twin.enable_gradient_checkpointing()
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(twin.parameters(), lr=RATE)
        forward = their_forward(twin)
    else:
        model = build_way(way, ddconfig, embed_dim, device)
        optimizer, forward = our_optimizer(model), our_forward(model)
    step = PlainStep(forward, optimizer, device, precision)
    images, noise = step_input(ddconfig, embed_dim, batch_size, size, device)

    def call() -> None:
        step(images, noise)
        optimizer.zero_grad(set_to_none=True)

    call()
    return call
