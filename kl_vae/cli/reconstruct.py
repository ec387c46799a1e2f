"""Reconstruct images and measure the difference. Also runs under torchrun."""

from __future__ import annotations

import argparse
import os

from kl_vae.cli.arguments import (
    add_image_arguments,
    add_lpips_files,
    add_mode_argument,
    add_model_arguments,
    add_output_arguments,
    add_ssim_argument,
    add_tiling_arguments,
    add_work_arguments,
    keywords,
    positive,
)

HELP = "reconstruct images, with PSNR, SSIM, a comparison image and a gallery"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    add_output_arguments(parser)
    add_image_arguments(parser)
    add_work_arguments(parser, "reconstructs")
    add_tiling_arguments(parser)
    add_mode_argument(parser)
    parser.add_argument(
        "--format",
        choices=("png", "webp", "jpg"),
        default="png",
        help="format of the images (default: png); metrics are those of a lossless format",
    )
    parser.add_argument(
        "--quality",
        type=positive,
        metavar="N",
        help="quality of webp (default: 95; 100: lossless) and jpg (default: 90), up to 100",
    )
    add_ssim_argument(parser)
    parser.add_argument(
        "--bits",
        type=int,
        choices=(8, 16),
        default=8,
        help="bits per channel of png files (default: 8); metrics are those of 8 bits",
    )
    parser.add_argument(
        "--lpips",
        choices=("none", "vgg", "alex", "squeeze"),
        default="none",
        help="also compute LPIPS with this network (default: none)",
    )
    add_lpips_files(parser)
    parser.add_argument(
        "--grid-size",
        type=positive,
        default=8,
        metavar="N",
        help="number of images in comparison.png (default: 8)",
    )
    parser.add_argument(
        "--no-gallery",
        dest="gallery",
        action="store_false",
        help="do not write index.html and gallery/",
    )


def run(args: argparse.Namespace) -> int:
    """Call `kl_vae.reconstruct` and print its result; return 1 if an image was skipped, else 0.

    Raises:
        ValueError: what the user can fix.
        RunError: a rank or a data worker was lost.
    """
    from kl_vae.inference.reconstruct import reconstruct
    from kl_vae.inference.reconstruction_report import COMPARISON, rounded
    from kl_vae.runtime.files import display_name

    result = reconstruct(**keywords(reconstruct, args))
    if os.environ.get("RANK", "0") != "0":
        return 0  # torchrun would end rank 0 while it prints
    lpips = "" if args.lpips == "none" else f", LPIPS {rounded(result.mean('lpips'), 4)}"
    ssim = "" if args.ssim == "wang" else f" ({args.ssim})"
    shown = f" ({COMPARISON} shows {result.shown} of them)" if result.shown else ""
    page = "" if result.page is None else f", gallery in {display_name(result.page)}"
    print(
        f"{result.count} images, {result.size}: PSNR {rounded(result.mean('psnr'), 2)} dB, "
        f"SSIM{ssim} {rounded(result.mean('ssim'), 3)}{lpips}; "
        f"images in {display_name(result.folder)}{shown}{page}",
        flush=True,
    )
    return 1 if result.skipped else 0
