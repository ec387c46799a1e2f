"""Large images: time and peak memory, whole and in strips, ours and diffusers'.

Each call runs in a process of its own, with the same random weights. With --checkpoint and --images
it also measures what tiles change in the reconstructions of images, against those made whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    Architecture,
    Timing,
    argument_parser,
    autocast,
    costs_of,
    describe_machine,
    markdown_table,
    parse,
    random_images,
    random_latents,
    reference_model,
    report,
)
from torch import Tensor

from kl_vae import AutoEncoderKL, accelerate
from kl_vae.data import center_crop, open_root, to_float
from kl_vae.inference.tiling import Tiling, decode_tiled, encode_tiled

WHOLE, EXACT = "whole", "exact"
DIFFUSERS, DIFFUSERS_TILED = "diffusers, whole", "diffusers, tiled"
VARIANTS = (WHOLE, EXACT, DIFFUSERS, DIFFUSERS_TILED)
TILE = 512  # pixels, of diffusers' tiles, which overlap by a quarter
BLOCK = 32  # pixels: side of the areas whose mean colour is compared
COLUMNS = {
    "": "{work}",
    "size": "{size} x {size}",
    "variant": "{variant}",
    "seconds": "{median:.3g}",
    "of whole": "{time_of_whole:.2f}",
    "peak, GB": "{peak_gb:.2f}",
    "peak, of whole": "{peak_of_whole:.2f}",
    "difference to the whole": "{difference:.1e}",
}
CHANGE_COLUMNS = {
    "variant": "{variant}",
    "mean difference": "{mean:.2g}",
    "largest": "{largest:.3g}",
    "largest change of a colour's mean over 32 x 32 pixels": "{colour:.2g}",
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; return the rows."""
    parser = argument_parser(__doc__, repeats=1)
    works = ("decode", "encode")
    parser.add_argument("--work", nargs="+", choices=works, default=works)
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024], help="pixels")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS[1:], default=VARIANTS[1:])
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (matplotlib)")
    parser.add_argument("--checkpoint", help="run or file whose reconstructions are compared")
    parser.add_argument("--images", help="folder of images for --checkpoint")
    parser.add_argument("--tile", type=int, default=256, help="side of those tiles (default: 256)")
    args = parse(parser, argv)
    if (args.checkpoint is None) != (args.images is None):
        parser.error("--checkpoint and --images: give both, or neither")

    notes = []
    if args.checkpoint is not None:
        changes = compare_reconstructions(args.checkpoint, args.images, args.tile, args.device)
        notes = [
            f"Reconstructions of {args.images} by {args.checkpoint} against those made whole, in "
            "steps of 8 bits:",
            markdown_table(CHANGE_COLUMNS, changes),
        ]
    rows = measure(args)
    heading = (
        f"{args.config}, one image, {args.precision}, each call in a process of its own, "
        f"{args.repeats} of each, interleaved"
    )
    report(args, heading, COLUMNS, rows, notes)
    if args.plot is not None:
        plot(rows, args.plot, f"{args.config}, {describe_machine(args.device)}")
    return rows


# ---- time and memory ----


def measure(args: Any) -> list[dict[str, Any]]:
    """Measure all variants at every size."""
    variants = [WHOLE, *(name for name in VARIANTS[1:] if name in args.variants)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Architecture.of(args.config).build()
        model.save_compvis(folder / "model.safetensors")
        reference_model(model).save_pretrained(folder / "diffusers")
        for size in args.sizes:
            for work in args.work:
                make = random_images if work == "encode" else random_latents
                torch.save(make(model, 1, size), folder / "input.pt")
                common = {"work": work, "device": args.device, "precision": args.precision}
                prepares = {v: partial(prepare, folder, v, **common) for v in variants}
                costs = costs_of(prepares, args.repeats, args.device)
                found = []
                for variant, each in costs.items():
                    about = {"work": work, "size": size, "variant": variant}
                    timing, peak = Timing.of([c.seconds for c in each]), max(c.peak for c in each)
                    row = {**about, **timing._asdict(), "peak": peak, "peak_gb": peak / 1e9}
                    row |= {"peak_of_whole": None, "time_of_whole": None, "difference": None}
                    if WHOLE in costs:
                        whole = found[0] if found else row
                        row["peak_of_whole"] = peak / whole["peak"]
                        row["time_of_whole"] = timing.median / whole["median"]
                        a, b = (torch.load(folder / f"{x}.pt") for x in (variant, WHOLE))
                        row["difference"] = (a - b).abs().max().item()
                    found.append(row)
                rows += found
    return rows


def prepare(
    folder: Path, variant: str, *, work: str, device: torch.device, precision: str
) -> Callable[[], None]:
    """Load the model and the input, in the process that measures."""
    load = load_reference if variant in (DIFFUSERS, DIFFUSERS_TILED) else load_own
    compute = load(folder, variant, work, device)
    x = torch.load(folder / "input.pt").to(device)

    def call() -> None:
        with torch.inference_mode(), autocast(device, precision):
            result = compute(x)
        torch.save(result.float().cpu().clone(), folder / f"{variant}.pt")

    return call


def load_own(
    folder: Path, variant: str, work: str, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return our function of images or latents."""
    model = accelerate(AutoEncoderKL.from_checkpoint(folder / "model.safetensors").to(device))
    tiling = Tiling(mode=variant)
    if work == "encode":
        return lambda x: encode_tiled(model, x, tiling).parameters
    return lambda x: decode_tiled(model, x, tiling)


def load_reference(
    folder: Path, variant: str, work: str, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return diffusers' function of images or latents."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(folder / "diffusers", low_cpu_mem_usage=False)
    model = model.to(device).eval()
    if variant == DIFFUSERS_TILED:
        enable_tiles(model, TILE)
    if work == "encode":
        return lambda x: model.encode(x).latent_dist.parameters
    return lambda x: model.decode(x).sample


def enable_tiles(reference: Any, tile: int) -> None:
    """Let diffusers' model use tiles of `tile` pixels."""
    reference.enable_tiling()
    reference.tile_sample_min_size = tile
    reference.tile_latent_min_size = tile // 2 ** (len(reference.config.block_out_channels) - 1)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw memory and time against the pixels, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    works = list(dict.fromkeys(row["work"] for row in rows))
    axes = figure.subplots(2, len(works), sharex=True, squeeze=False)
    labels = {"peak_gb": "peak memory of the process, GB", "median": "seconds"}
    for line, (key, label) in zip(axes, labels.items(), strict=True):
        for axis, work in zip(line, works, strict=True):
            for variant in dict.fromkeys(row["variant"] for row in rows):
                points = [r for r in rows if (r["work"], r["variant"]) == (work, variant)]
                megapixels = [row["size"] ** 2 / 1e6 for row in points]
                axis.loglog(megapixels, [row[key] for row in points], marker="o", label=variant)
            axis.set_title(work)
            axis.set_ylabel(label)
            axis.set_xlabel("megapixels")
            axis.grid(True, which="both", alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=110)


# ---- what tiles change ----


@torch.inference_mode()
def compare_reconstructions(
    checkpoint: str, images: str, tile: int, device: torch.device
) -> list[dict[str, Any]]:
    """Reconstruct squares of images in each variant, and compare with the whole reconstruction.

    Raises:
        ValueError: an image that is not larger than the tile.
    """
    model = AutoEncoderKL.from_checkpoint(checkpoint).to(device)
    overlap, f = tile // 4, model.downsampling_factor
    reference = reference_model(model).eval()
    enable_tiles(reference, tile)
    accelerate(model)

    def own(tiling: Tiling) -> Callable[[Tensor], Tensor]:
        return lambda x: decode_tiled(model, encode_tiled(model, x, tiling).mode(), tiling)

    whole = own(Tiling(mode="whole"))
    variants = {
        "exact": own(Tiling(mode="exact")),
        "blend": own(Tiling(mode="blend", tile=tile, overlap=overlap)),
        "diffusers' tiles": lambda x: reference(x).sample,  # of the posterior's mode
    }
    source = open_root(images, model.config.in_channels)
    changes: dict[str, list[Tensor]] = {name: [] for name in variants}
    for index in range(len(source)):
        image = source.read(index)
        side = min(image.shape[1:]) // f * f
        if side <= tile:
            raise ValueError(f"{source.name(index)}: not larger than --tile {tile}; lower it")
        x = to_float(center_crop(image, side))[None].to(device)
        expected = whole(x).clamp(-1.0, 1.0)
        for name, variant in variants.items():
            difference = 127.5 * (variant(x).clamp(-1.0, 1.0) - expected)
            colour = F.avg_pool2d(difference, min(BLOCK, side)).abs().max()
            values = (difference.abs().mean(), difference.abs().max(), colour)
            changes[name].append(torch.stack(values))
    rows = []
    for name, each in changes.items():
        mean, largest, colour = torch.stack(each).unbind(dim=1)  # each [images]
        rows.append({"variant": name, "mean": mean.mean().item()})
        rows[-1] |= {"largest": largest.max().item(), "colour": colour.max().item()}
    return rows


if __name__ == "__main__":
    main()
