"""Encode and decode: ours against diffusers' AutoencoderKL with the same weights and inputs.

All variants run in one process, interleaved. Before they are timed, each one's result is compared
with that of diffusers; a difference beyond rounding ends the benchmark.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import (
    DTYPES,
    Architecture,
    alternate,
    argument_parser,
    autocast,
    check_difference,
    parse,
    random_images,
    random_latents,
    reference_model,
    report,
)
from torch import Tensor

from kl_vae import AutoEncoderKL, accelerate

# of moments, or of images in [-1, 1]
BOUNDS = {"fp32": 1e-3, "bf16": 0.5, "fp16": 0.5}
COLUMNS = {
    "": "{work}",
    "variant": "{variant}",
    "images": "{batch} x {size} x {size}",
    "median s": "{median:.4g}",
    "low to high s": "{low:.4g} to {high:.4g}",
    "images/s": "{rate:.3g}",
    "speed": "{speed:.2f}",
    "difference": "{difference:.1e}",
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; return the rows."""
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--work", nargs="+", choices=("encode", "decode"), default=None)
    parser.add_argument("--sizes", nargs="+", type=int, default=[256], help="sides, pixels")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="all also by torch.compile")
    args = parse(parser, argv)

    model = scaled_model(Architecture.of(args.config)).to(args.device)
    modules = reference_variants(model, args.precision) | own_variants(model, args.device)
    rows = []
    for work in args.work or ("encode", "decode"):
        coders = {name: coder(x, work, args.precision) for name, x in modules.items()}
        if args.compile:
            coders |= {f"{name}, compiled": torch.compile(f) for name, f in coders.items()}
        for size in args.sizes:
            for batch in args.batch_sizes:
                make = random_images if work == "encode" else random_latents
                rows += measure(coders, make(model, batch, size), args)
                for row in rows[-len(coders) :]:
                    row |= {"work": work, "batch": batch, "size": size}
                    row["rate"] = batch / row["median"]
    notes = [
        "Speed: against the first row of the same images. Difference: the largest absolute one to "
        "its moments or images."
    ]
    heading = f"{args.config}, {args.precision}, {args.repeats} of each, interleaved"
    report(args, heading, COLUMNS, rows, notes)
    return rows


@torch.no_grad()
def scaled_model(architecture: Architecture) -> AutoEncoderKL:
    """Build a model that decodes latents of unit variance to about [-1, 1].

    A difference of images is then what it is of a trained model.
    """
    model = architecture.build().eval()
    largest = model.decode(random_latents(model, 1, 8 * model.downsampling_factor)).abs().max()
    for parameter in model.decoder.conv_out.parameters():
        parameter.div_(largest)
    return model


def reference_variants(model: AutoEncoderKL, precision: str) -> dict[str, Any]:
    """Return diffusers' modules as users run them, and in the layout that is often faster.

    In half precision also with half-precision weights, as its pipelines load them.
    """
    reference = reference_model(model)
    faster = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    variants = {"diffusers": reference, "diffusers, channels_last": faster}
    if precision != "fp32":
        half = copy.deepcopy(reference).to(DTYPES[precision])
        variants[f"diffusers, {precision} weights"] = half
    return variants


def own_variants(model: AutoEncoderKL, device: torch.device) -> dict[str, Any]:
    """Return our plain modules, and accelerated ones."""
    plain = {"channels_last": False, "winograd": False, "merge_upsampling": False}
    variants = {"ours, plain modules": accelerate(copy.deepcopy(model), **plain)}
    if device.type == "cpu":
        exact = accelerate(copy.deepcopy(model), winograd=False)
        variants["ours, without Winograd"] = exact
    return variants | {"ours": accelerate(copy.deepcopy(model))}


def coder(module: Any, work: str, precision: str) -> Callable[[Tensor], Tensor]:
    """Return a function without gradients: images to moments, or latents to images."""
    parameter = next(module.parameters())
    is_ours = isinstance(module, AutoEncoderKL)

    def call(x: Tensor) -> Tensor:
        result: Tensor
        with torch.inference_mode(), autocast(parameter.device, precision):
            x = x.to(parameter.dtype)
            if work == "encode":
                posterior = module.encode(x) if is_ours else module.encode(x).latent_dist
                result = posterior.parameters
            else:
                result = module.decode(x) if is_ours else module.decode(x).sample
        return result

    return call


def measure(
    coders: dict[str, Callable[[Tensor], Tensor]], x: Tensor, args: Any
) -> list[dict[str, Any]]:
    """Compare the results of all, then time them."""
    expected = next(iter(coders.values()))(x).float()
    differences = {}
    for name, call in coders.items():
        differences[name] = (call(x).float() - expected).abs().max().item()
        check_difference(differences[name], BOUNDS[args.precision], name)
    timings = alternate({n: partial(f, x) for n, f in coders.items()}, args.repeats, args.device)
    first = next(iter(timings.values())).median
    return [
        {
            "variant": name,
            **timing._asdict(),
            "speed": first / timing.median,
            "difference": differences[name],
        }
        for name, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
