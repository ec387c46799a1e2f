"""The arguments of `kl-vae reconstruct`."""

import argparse

from kl_vae.cli.arguments import (
    add_image_arguments,
    add_model_arguments,
    add_picture_arguments,
    add_tiling_arguments,
    add_work_arguments,
    positive,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    add_picture_arguments(parser)
    add_image_arguments(parser)
    add_work_arguments(parser, "reconstructs")
    add_tiling_arguments(parser)
    parser.add_argument(
        "--mode",
        choices=("mode", "sample"),
        default="mode",
        help="decode the posterior's mode (default) or a sample of it",
    )
    parser.add_argument(
        "--format",
        choices=("png", "webp", "jpg"),
        default="png",
        help="of the pictures (default: png); the figures are measured before a lossy format",
    )
    parser.add_argument(
        "--quality",
        type=positive,
        metavar="N",
        help="of webp (default: 95; 100: lossless) and jpg (default: 90), up to 100",
    )
    parser.add_argument(
        "--lpips",
        choices=("none", "vgg", "alex", "squeeze"),
        default="none",
        help="measure this perceptual distance as well (default: none)",
    )
    parser.add_argument(
        "--lpips-features",
        metavar="FILE",
        help="the network's weights, instead of torchvision's, which are downloaded once",
    )
    parser.add_argument(
        "--lpips-heads",
        metavar="FILE",
        help="the linear heads, instead of the published ones, which are downloaded once",
    )
    parser.add_argument(
        "--grid-size",
        type=positive,
        default=8,
        metavar="N",
        help="images in comparison.png (default: 8)",
    )
    parser.add_argument(
        "--no-gallery",
        action="store_true",
        help="write no index.html, and none of its pictures in gallery/",
    )
