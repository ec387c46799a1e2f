"""What was measured of one way to do some work, as a row of a table and as figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kl_vae.benchmark.flops import Work
from kl_vae.benchmark.timing import Timing

MATRIX_PRODUCT = "a matrix product"


@dataclass(frozen=True)
class Measurement:
    """One way to do a piece of work.

    Attributes:
        work: encode, decode or step.
        way: whose modules, and how they are arranged.
        batch_size: images a call.
        size: side of the images in pixels.
        timing: of a call.
        flops: operations that the plain modules need for a call (see `count_flops`).
        product_rate: FLOP/s of a large matrix product in the same precision, timed by turns with
            it.
        difference: largest absolute one to the first way's result; None: not compared.
        synchronisations: of a call, how often the CPU waits for the GPU; None: not on a GPU.
    """

    work: Work
    way: str
    batch_size: int
    size: int
    timing: Timing
    flops: int
    product_rate: float
    difference: float | None
    synchronisations: int | None = None

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return self.batch_size / self.timing.median

    @property
    def rate(self) -> float:
        """FLOP/s, by the median."""
        return self.flops / self.timing.median

    @property
    def share(self) -> float:
        """The rate as a part of the matrix product's."""
        return self.rate / self.product_rate

    @property
    def figures(self) -> dict[str, Any]:
        """Plain values: what was measured and what follows from it."""
        computed = ("images_per_second", "rate", "share")
        return {**dataclasses.asdict(self), **{key: getattr(self, key) for key in computed}}


def table(measurements: Sequence[Measurement], result: str = "result") -> str:
    """Markdown: a row each, the speed relative to the first way with the same images.

    Args:
        measurements: the ways of each number and size of images one after the other.
        result: what the differences are of.
    """
    lines = [
        f"| way | images | median s | low to high s | images/s | speed | GFLOP/s | of "
        f"{MATRIX_PRODUCT} | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in measurements:
        first = next(x for x in measurements if (x.batch_size, x.size) == (m.batch_size, m.size))
        cells = [
            m.way,
            f"{m.batch_size} x {m.size} x {m.size}",
            m.timing.cells,
            f"{m.images_per_second:.3g}",
            f"{first.timing.median / m.timing.median:.2f}",
            f"{m.rate / 1e9:.0f}",
            f"{m.share:.0%}",
            "" if m.difference is None else f"{m.difference:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    counts = {(m.batch_size, m.size): m for m in measurements}
    for (batch_size, size), m in counts.items():
        lines += [
            "",
            f"{batch_size} x {size} x {size}: {m.flops / 1e9:.4g} GFLOP (convolutions and matrix "
            f"products of the plain modules); {MATRIX_PRODUCT} runs at "
            f"{m.product_rate / 1e9:.0f} GFLOP/s.",
        ]
    for m in measurements:
        if m.synchronisations is not None:
            lines += ["", f"{m.way}: the CPU waits for the GPU {m.synchronisations} times a step."]
    first_way = measurements[0].way
    lines += [
        "",
        f"Speed is relative to: {first_way}. Difference: the largest absolute one of the {result} "
        "to its. A rate above that of the product means fewer operations than counted.",
    ]
    return "\n".join(lines)
