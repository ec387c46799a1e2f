"""Peak memory of encoding, decoding and a training step: ours against diffusers' AutoencoderKL.

Each call runs in a process of its own. On a GPU its counters are read, else the largest resident
set of the process, with Python, torch and, where it is used, diffusers. Weights are random.
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
from encode_decode import coder
from step import OWN_STEPS, PlainStep, own_model, own_optimizer

from kl_vae import accelerate

COLUMNS = {
    "": "{work}",
    "images": "{batch} x {size} x {size}",
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
    works = ("decode", "encode", "step")
    parser.add_argument("--work", nargs="+", choices=works, default=works)
    parser.add_argument("--size", type=int, default=1024, help="side of encode and decode, pixels")
    parser.add_argument("--step-size", type=int, default=256, help="side of a step, pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    args = parse(parser, argv)

    architecture = Architecture.of(args.config)
    reference_config = dict(reference_model(architecture.build()).config)
    rows = []
    for work in args.work:
        size = args.step_size if work == "step" else args.size
        prepare = prepare_step if work == "step" else partial(prepare_coder, work)
        variants = [DIFFUSERS, "ours, plain modules", "ours"]
        if work == "step":
            variants = [DIFFUSERS, CHECKPOINTED, *OWN_STEPS]
        prepares = {
            name: partial(
                prepare,
                name,
                architecture=architecture,
                reference_config=reference_config,
                batch=args.batch_size,
                size=size,
                device=args.device,
                precision=args.precision,
            )
            for name in variants
        }
        found = []
        for name, costs in costs_of(prepares, args.repeats, args.device).items():
            peak, added = max(c.peak for c in costs), max(c.peak - c.before for c in costs)
            about = {"work": work, "variant": name, "batch": args.batch_size, "size": size}
            timing = Timing.of([c.seconds for c in costs])
            found.append({**about, **timing._asdict(), "peak": peak, "added": added})
        for row in found:
            row |= {"peak_gb": row["peak"] / 1e9, "added_gb": row["added"] / 1e9}
            row["peak_of_first"] = row["peak"] / found[0]["peak"]
            row["added_of_first"] = row["added"] / found[0]["added"]
            row["time_of_first"] = row["median"] / found[0]["median"]
        rows += found
    notes = [
        "Added: of the peak by the call, beyond weights, input and, of a step, the optimiser's "
        "state. Times of encode and decode are of first calls, of a step of the second one."
    ]
    heading = f"Memory, {args.config}, {args.precision}, {args.repeats} of each, interleaved"
    report(args, heading, COLUMNS, rows, notes)
    return rows


def _reference(config: dict[str, Any], device: torch.device) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config).to(device)


def prepare_coder(
    work: str,
    variant: str,
    *,
    architecture: Architecture,
    reference_config: dict[str, Any],
    batch: int,
    size: int,
    device: torch.device,
    precision: str,
) -> Callable[[], object]:
    """Build the module and its input, in the process that measures."""
    model = architecture.build().eval().to(device)
    make = random_images if work == "encode" else random_latents
    x = make(model, batch, size)
    if variant == DIFFUSERS:
        return partial(coder(_reference(reference_config, device).eval(), work, precision), x)
    if variant == "ours":
        accelerate(model)
    return partial(coder(model, work, precision), x)


def prepare_step(
    variant: str,
    *,
    architecture: Architecture,
    reference_config: dict[str, Any],
    batch: int,
    size: int,
    device: torch.device,
    precision: str,
) -> Callable[[], object]:
    """Build the step and take the first, in the process that measures."""
    model = own_model(variant if variant in OWN_STEPS else "ours", architecture, device)
    images = random_images(model, batch, size)
    noise = random_latents(model, batch, size)
    if variant in OWN_STEPS:
        step = PlainStep(model, own_optimizer(model), precision)
    else:
        reference = _reference(reference_config, device).train()
        if variant == CHECKPOINTED:
            reference.enable_gradient_checkpointing()
        step = PlainStep(reference, torch.optim.AdamW(reference.parameters(), lr=1e-6), precision)

    def call() -> None:
        step(images, noise)
        step.optimizer.zero_grad(set_to_none=True)

    call()
    return call


if __name__ == "__main__":
    main()
