"""Encode and decode images, and measure what is lost."""

import argparse
import dataclasses
import sys

from kl_vae.cli.arguments import (
    add_image_arguments,
    add_model_arguments,
    add_picture_arguments,
    positive,
)

HELP = "reconstruct images, with PSNR, SSIM and a comparison picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    add_picture_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument(
        "--mode",
        choices=("mode", "sample"),
        default="mode",
        help="decode the posterior's mode (default) or a sample of it",
    )
    parser.add_argument(
        "--grid-size",
        type=positive,
        default=8,
        metavar="N",
        help="images in comparison.png (default: 8)",
    )


def run(args: argparse.Namespace) -> int:
    """Reconstruct images; 1 if any was skipped, else 0.

    Raises:
        ValueError: what the user can mend; nothing has been written then, unless writing failed.
    """
    from tqdm import tqdm

    from kl_vae.data import ImageError, display_name, resolve_root
    from kl_vae.device import choose_device
    from kl_vae.inference.load import load_model
    from kl_vae.inference.outputs import check_output_folder, check_outputs, plan_outputs
    from kl_vae.inference.picture_files import image_suffix, save_image
    from kl_vae.inference.reconstruct import ReconstructConfig, reconstruct_file
    from kl_vae.inference.report import METRICS, RESERVED, Report
    from kl_vae.inference.sources import list_sources

    config = ReconstructConfig(
        args.resize, args.crop, args.mode, args.seed, args.precision, args.max_pixels
    )
    out = resolve_root(args.out)
    device = choose_device(args.device)
    model = load_model(args.checkpoint, args.config, device, ema=not args.no_ema)
    channels = model.config.in_channels
    sources, folders = list_sources(args.images, channels, args.include, args.exclude)
    check_output_folder(out, folders)
    suffix = image_suffix(channels)
    outputs = plan_outputs([source.relative for source in sources], suffix, RESERVED)
    inputs = [source.path for source in sources]
    check_outputs(out, [*outputs, *RESERVED], inputs, earlier=METRICS)

    report = Report(out, model.to_rgb, args.grid_size)
    pairs = list(zip(sources, outputs, strict=True))
    for source, output in tqdm(pairs, unit="image", disable=None):  # no bar where stderr is a file
        try:
            result = reconstruct_file(model, source.path, config, source.relative)
        except ImageError as error:
            report.skip(source, error)
            tqdm.write(f"skipped {error}", file=sys.stderr)
            continue
        save_image(out / output, result.reconstruction)
        report.add(source, output, result)
    about = {
        "checkpoint": display_name(args.checkpoint),
        "images": [display_name(root) for root in args.images],
        **dataclasses.asdict(config),
        "device": str(device),
    }
    print(report.finish(about))
    return 1 if report.number_skipped else 0
