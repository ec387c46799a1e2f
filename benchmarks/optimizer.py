"""What an update by Muon adds to a training step, against one by Adam."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from common import Architecture, alternate, argument_parser, parse, random_images, report

from kl_vae import accelerate
from kl_vae.optim.config import OptimizerConfig, build_optimizer

IMAGE, ADAM, MUON = "an image, forward and backward", "an update by Adam", "an update by Muon"
COLUMNS = {
    "": "{variant}",
    "median s": "{median:.4g}",
    "low to high s": "{low:.4g} to {high:.4g}",
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; return the rows."""
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--size", type=int, default=256, help="side of the image, pixels")
    parser.add_argument("--images", type=int, default=12, help="of the step that is computed")
    args = parse(parser, argv)

    model = Architecture.of(args.config).build().to(args.device)
    image = random_images(model, 1, args.size)
    updated = copy.deepcopy(model)  # keeps its gradients
    for parameter in updated.parameters():
        parameter.grad = torch.randn_like(parameter)
    accelerate(model)  # as a run trains
    model.set_activation_checkpointing("norms")

    def pass_image() -> None:
        reconstruction, _ = model(image)
        (image - reconstruction).abs().mean().backward()
        model.zero_grad(set_to_none=True)

    # rates so small that the weights stay as they are
    rates = {"learning_rate": 1e-6, "adamw_learning_rate": 1e-6}
    adam, muon = (
        build_optimizer(updated.parameters(), OptimizerConfig(name=name, **rates))
        for name in ("adam", "muon")
    )
    calls = {IMAGE: pass_image, ADAM: adam.step, MUON: muon.step}
    timings = alternate(calls, args.repeats, args.device)
    rows = [{"variant": name, **timing._asdict()} for name, timing in timings.items()]
    steps = [args.images * timings[IMAGE].median + timings[x].median for x in (ADAM, MUON)]
    notes = [
        f"Computed from the medians, a step of {args.images} images takes {steps[0]:.4g} s with "
        f"Adam and {steps[1]:.4g} s with Muon, {steps[1] / steps[0] - 1.0:+.1%}. The loss is L1; "
        "LPIPS, a discriminator and data loading, which cost the same with either, are not in it."
    ]
    heading = (
        f"Adam and Muon on all parameters of {args.config}, an image of {args.size} x {args.size}, "
        f"{args.repeats} of each, interleaved"
    )
    report(args, heading, COLUMNS, rows, notes)
    return rows


if __name__ == "__main__":
    main()
