"""The arguments of `kl-vae sample`, and which of them go together."""

from __future__ import annotations

import argparse

from kl_vae.cli.arguments import (
    add_model_arguments,
    add_picture_arguments,
    add_tiling_arguments,
    add_work_arguments,
    positive,
)

SOURCES = ("prior", "gaussian", "interpolation", "posterior")
OF_IMAGES = ("gaussian", "interpolation", "posterior")

# which --from has a use for what
USES = {
    "number": ("prior", "gaussian", "posterior"),
    "latents": ("gaussian",),
    "fit_images": ("gaussian",),
    "covariance": ("gaussian",),
    "images": OF_IMAGES,
    "include": OF_IMAGES,
    "exclude": OF_IMAGES,
    "max_pixels": OF_IMAGES,
    "steps": ("interpolation",),
    "lerp": ("interpolation",),
}


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    add_picture_arguments(parser)
    add_work_arguments(parser, "draws or encodes")
    add_tiling_arguments(parser)
    parser.add_argument(
        "--from",
        dest="source",
        choices=SOURCES,
        default="prior",
        help="where latents come from: N(0, I) (default), a Gaussian fitted to a data set's, the "
        "way from one image's to another's, or samples of an image's posterior",
    )
    parser.add_argument(
        "--number",
        type=positive,
        metavar="N",
        help="images to draw, of posterior for each of --images (default: 16)",
    )
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="their side in pixels (default: the resolution of the model's config)",
    )
    _add_image_arguments(parser)
    _add_gaussian_arguments(parser)
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="interpolation: pictures from one image to the next, both included (default: 9)",
    )
    parser.add_argument(
        "--lerp",
        action="store_true",
        help="interpolation: on the straight line, not on the arc (slerp)",
    )


def check_together(args: argparse.Namespace) -> None:
    """Check that the arguments given go together.

    Raises:
        ValueError: they do not.
    """
    for key, users in USES.items():
        if getattr(args, key) and args.source not in users:
            raise ValueError(
                f"--{key.replace('_', '-')}: --from {args.source} has no use for it; leave it out, "
                f"or give --from {' or '.join(users)}"
            )
    if args.source == "gaussian" and (args.latents is None) == (args.images is None):
        raise ValueError(
            "--from gaussian: give --latents FOLDER, which kl-vae encode has written, or --images "
            "FOLDER, one of the two"
        )
    if args.source in ("interpolation", "posterior") and args.images is None:
        raise ValueError(f"--from {args.source}: give --images, which it begins with")
    if args.images is None:
        for key in ("include", "exclude", "max_pixels"):
            if getattr(args, key):
                raise ValueError(
                    f"--{key.replace('_', '-')}: chooses among --images, which are not given; "
                    "leave it out"
                )
    if args.steps is not None and args.steps < 2:
        raise ValueError(f"--steps {args.steps}: give at least 2, which are the images themselves")


def _add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="FOLDER_OR_FILE",
        help="images to fit to, to go from and to (of a folder its first two), or whose posteriors "
        "to draw from; they are resized and cropped to --size",
    )
    parser.add_argument(
        "--include", nargs="+", metavar="PATTERN", help="take these files of folders only"
    )
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="leave these files out")
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse images with more pixels, before they are decoded (default: 178956970)",
    )


def _add_gaussian_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--latents",
        metavar="FOLDER",
        help="gaussian: fit to the latents that kl-vae encode --out has written here",
    )
    parser.add_argument(
        "--fit-images",
        type=positive,
        metavar="N",
        help="gaussian: how many to fit to at most, evenly spaced (default: 1000)",
    )
    parser.add_argument(
        "--covariance",
        choices=("channel", "channels", "low-resolution"),
        help="gaussian: of each value alone, of the channels at a position, or of all channels and "
        "positions of a coarse grid (default), which has the large shapes",
    )
