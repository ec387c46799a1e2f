"""`kl-vae benchmark tiling`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kl_vae.cli.arguments import CHECKPOINT, positive
from kl_vae.cli.benchmark.shared import add_model_arguments, check_out, prepare, report

HELP = "memory and time against size, whole and in strips, ours and diffusers'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    add_model_arguments(parser)
    parser.set_defaults(repeats=1)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=[(256, 256), (512, 512), (1024, 1024)],
        metavar="N",
        help="sides in pixels, or WIDTHxHEIGHT (default: 256 512 1024)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32"
    )
    parser.add_argument(
        "--what",
        nargs="+",
        choices=("decode", "encode"),
        default=("decode", "encode"),
        help="default: both",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=("exact", "diffusers, whole", "diffusers, tiled"),
        default=("exact", "diffusers, whole", "diffusers, tiled"),
        help="beside whole (default: all)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them; needs matplotlib")
    parser.add_argument(
        "--checkpoint",
        metavar="RUN_OR_FILE",
        help=f"measure what blended tiles change in --images as well, with {CHECKPOINT}",
    )
    parser.add_argument("--images", nargs="+", metavar="FOLDER_OR_FILE", help="for --checkpoint")
    parser.add_argument(
        "--tile",
        type=positive,
        default=256,
        metavar="N",
        help="side of those tiles in pixels, which overlap by a quarter (default: 256)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from tqdm import tqdm

    from kl_vae.benchmark.machine import describe_machine
    from kl_vae.benchmark.plots import matplotlib_figure
    from kl_vae.benchmark.tiling import measure, plot, table
    from kl_vae.inference.encode import check_size

    ddconfig, embed_dim, device = prepare(args)
    for size in args.sizes:
        for side in size:
            check_size(side, ddconfig.downsampling_factor)
    if (args.checkpoint is None) != (args.images is None):
        raise ValueError("--checkpoint and --images: give both, or neither")
    check_out(args.plot, "--plot")
    if args.plot is not None:
        matplotlib_figure()  # an error before hours of measuring
    compare = None if args.checkpoint is None else _comparison(args)
    steps = measure(
        ddconfig,
        embed_dim,
        device,
        args.sizes,
        args.repeats,
        args.precision,
        args.what,
        args.ways,
    )
    measured = list(tqdm(steps, unit="measured", disable=None))
    tables = [table(measured)]
    figures = {"measured": [dataclasses.asdict(m) for m in measured]}
    if args.plot is not None:
        plot(measured, args.plot, f"{args.config}, {describe_machine(device)}")
    if compare is not None:
        text, figures["seams"] = compare()
        tables.append(text)
    heading = (
        f"{args.config}, one image, {args.precision}, each call in a process of its own, "
        f"{args.repeats} of each by turns"
    )
    report(args, heading, "\n\n".join(tables), device, figures)
    return 0


def _comparison(args: argparse.Namespace) -> Callable[[], tuple[str, list[dict[str, Any]]]]:
    """What tells how blending changes the pictures, which are all looked at beforehand."""
    from kl_vae.benchmark.seams import compare_seams, table
    from kl_vae.data import center_crop, to_float
    from kl_vae.inference.load import load_model
    from kl_vae.inference.sources import open_sources
    from kl_vae.runtime.device import choose_device

    device = choose_device(args.device)
    model = load_model(args.checkpoint, None, device)
    source, _ = open_sources(args.images, model.config.in_channels)
    f = model.downsampling_factor
    images = []
    for index in range(len(source)):
        image = source.read(index)
        side = min(image.shape[1:]) // f * f
        if side <= args.tile:
            raise ValueError(
                f"{source.name(index)}: not larger than --tile {args.tile}; give larger pictures, "
                "or smaller tiles"
            )
        images.append(to_float(center_crop(image, side)))

    def compare() -> tuple[str, list[dict[str, Any]]]:
        changes = compare_seams(model, images, args.tile, args.tile // 4)
        text = (
            f"Reconstructions of {len(images)} pictures against those made whole, in steps of 8 "
            f"bits (colour: a channel's mean over 32 x 32 pixels):\n\n{table(changes)}"
        )
        return text, [{"way": way, **dataclasses.asdict(c)} for way, c in changes.items()]

    return compare


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return positive(width), positive(height or width)
