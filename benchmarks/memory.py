"""Peak memory of a plain training step: ours against diffusers' AutoencoderKL.

Each step runs in a process of its own, the second one of it. On a GPU its counters are read, else
the largest resident set of the process, with Python, torch and, where it is used, diffusers.
Weights are random. `tiling.py` measures encoding and decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import (
    DTYPES,
    Architecture,
    Timing,
    argument_parser,
    costs_of,
    parse,
    random_images,
    random_latents,
    reference_model,
    report,
)
from step import LEARNING_RATE, OWN_STEPS, PlainStep, own_model, own_optimizer

COLUMNS = {
    "variant": "{variant}",
    "peak, GB": "{peak_gb:.2f}",
    "of first": "{peak_of_first:.2f}",
    "added, GB": "{added_gb:.2f}",
    "added, of first": "{added_of_first:.2f}",
    "median s": "{median:.3g}",
    "time, of first": "{time_of_first:.2f}",
}
DIFFUSERS, CHECKPOINTED = "diffusers", "diffusers, gradient checkpointing"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; return the rows."""
    parser = argument_parser(__doc__, repeats=1)
    parser.add_argument("--size", type=int, default=256, help="side of the images, pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    args = parse(parser, argv)

    architecture = Architecture.of(args.config)
    config = dict(reference_model(architecture.build()).config)
    prepares = {
        name: partial(prepare, name, architecture, config, args)
        for name in (DIFFUSERS, CHECKPOINTED, *OWN_STEPS)
    }
    rows: list[dict[str, Any]] = []
    for name, costs in costs_of(prepares, args.repeats, args.device).items():
        peak, added = max(c.peak for c in costs), max(c.peak - c.before for c in costs)
        row = {"variant": name, **Timing.of([c.seconds for c in costs])._asdict()}
        rows.append({**row, "peak": peak, "added": added})
    for row in rows:
        row |= {"peak_gb": row["peak"] / 1e9, "added_gb": row["added"] / 1e9}
        row["peak_of_first"] = row["peak"] / rows[0]["peak"]
        row["added_of_first"] = row["added"] / rows[0]["added"]
        row["time_of_first"] = row["median"] / rows[0]["median"]
    notes = ["Added: by the step, beyond weights, images and the optimiser's state."]
    images = f"{args.batch_size} x {args.size} x {args.size}"
    heading = f"Memory of a step of {args.config}, {images}, {args.precision}"
    report(args, heading, COLUMNS, rows, notes)
    return rows


def prepare(
    variant: str, architecture: Architecture, reference_config: dict[str, Any], args: Any
) -> Callable[[], object]:
    """Build the step and take the first, in the process that measures."""
    model = own_model(variant if variant in OWN_STEPS else "ours", architecture, args.device)
    images = random_images(model, args.batch_size, args.size)
    noise = random_latents(model, args.batch_size, args.size)
    if variant in OWN_STEPS:
        step = PlainStep(model, own_optimizer(model), args.precision)
    else:
        from diffusers import AutoencoderKL

        reference = AutoencoderKL.from_config(reference_config).to(args.device).train()
        if variant == CHECKPOINTED:
            reference.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(reference.parameters(), lr=LEARNING_RATE)
        step = PlainStep(reference, optimizer, args.precision)

    def call() -> None:
        step(images, noise)
        step.optimizer.zero_grad(set_to_none=True)

    call()
    return call


if __name__ == "__main__":
    main()
