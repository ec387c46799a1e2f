"""An epoch over latents on disk, against decoding and encoding the images once more."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Architecture, Timing, alternate, argument_parser, parse, report
from data import write_images
from torch.utils.data import DataLoader

from kl_vae import AutoEncoderKL
from kl_vae.cli.main import main as kl_vae_command
from kl_vae.data import LatentDataset, read_image, to_float

COLUMNS = {
    "": "{variant}",
    "s": "{median:.4g}",
    "lowest to highest": "{low:.4g} to {high:.4g}",
    "µs an image": "{per_image:.4g}",
    "ratio": "{ratio:.1f}",
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; return the rows."""
    parser = argument_parser(__doc__, repeats=5)
    parser.set_defaults(config="cifar10")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--number", type=int, default=10_000, help="images (default: 10,000)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=1)
    args = parse(parser, argv)

    model = Architecture.of(args.config).build().eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", args.number, args.size)
        model.save_compvis(folder / "model.safetensors")
        command = ["encode", "--checkpoint", str(folder / "model.safetensors")]
        command += ["--images", str(folder / "images"), "--out", str(folder / "latents")]
        command += ["--resize", str(args.size), "--crop", str(args.size)]
        command += ["--batch-size", str(args.batch_size), "--num-workers", str(args.num_workers)]
        command += ["--device", str(args.device)]
        start = time.perf_counter()
        if kl_vae_command(command) != 0:
            raise RuntimeError(f"kl-vae {' '.join(command)}: failed")
        encoding = Timing.of([time.perf_counter() - start])

        latents = LatentDataset(folder / "latents")
        difference = compare(model, latents, folder / "images", args.batch_size)
        loader = DataLoader(
            latents,
            batch_size=args.batch_size,
            shuffle=True,
            num_workers=args.num_workers,
            multiprocessing_context="fork" if args.num_workers else None,
        )

        def epoch() -> None:
            assert sum(len(batch.latents) for batch in loader) == args.number

        reading = alternate({"epoch": epoch}, args.repeats, args.device)["epoch"]
    timings = {"decode and encode the images": encoding, "an epoch over their latents": reading}
    rows = [
        {
            "variant": variant,
            **timing._asdict(),
            "per_image": 1e6 * timing.median / args.number,
            "ratio": timing.median / reading.median,
        }
        for variant, timing in timings.items()
    ]
    notes = [f"The latents differ from the model's by {difference:.1e} (they are stored as fp16)."]
    heading = f"{args.number:,} images of {args.size} x {args.size} by {args.config}"
    report(args, heading, COLUMNS, rows, notes)
    return rows


@torch.inference_mode()
def compare(model: AutoEncoderKL, latents: LatentDataset, folder: Path, number: int) -> float:
    """Return the largest difference of the first latents to the model's.

    Raises:
        RuntimeError: it is more than fp16's rounding.
    """
    largest = 0.0
    for index in range(min(number, len(latents))):
        sample = latents[index]
        image = to_float(read_image(folder / sample.name, 3))
        expected = model.encode(image[None]).parameters[0]
        difference = (sample.latents.float() - expected).abs().max().item()
        if difference > 2e-3 * max(1.0, expected.abs().max().item()):
            raise RuntimeError(f"{sample.name}: its latents differ by {difference:.1e}")
        largest = max(largest, difference)
    return largest


if __name__ == "__main__":
    main()
