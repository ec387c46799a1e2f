"""Decode latents of the prior N(0, I), between images, or of posteriors.

A KL autoencoder with a small kl_weight is not a generative model: N(0, I) gives texture without
objects.
"""

from __future__ import annotations

import argparse
import os

from kl_vae.cli.arguments import (
    add_format_arguments,
    add_model_arguments,
    add_output_arguments,
    add_tiling_arguments,
    add_work_arguments,
    keywords,
    positive,
)

HELP = "decode latents drawn from N(0, I) or posteriors, or between images"

OF_IMAGES = ("interpolation", "posterior")
# the --from that use an argument; None keeps the default of `sample`
USES = {
    "number": ("prior", "posterior"),
    "images": OF_IMAGES,
    "include": OF_IMAGES,
    "exclude": OF_IMAGES,
    "max_pixels": OF_IMAGES,
    "value_range": OF_IMAGES,
    "pages": OF_IMAGES,
    "steps": ("interpolation",),
    "linear": ("interpolation",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    add_output_arguments(parser)
    add_work_arguments(parser, "encodes or decodes")
    add_tiling_arguments(parser)
    parser.add_argument(
        "--from",
        dest="origin",
        choices=("prior", *OF_IMAGES),
        default="prior",
        help="origin of the latents: N(0, I) (default), interpolation between two images, or "
        "samples of the posterior of an image",
    )
    parser.add_argument(
        "--number",
        type=positive,
        metavar="N",
        help="number of images; with posterior per image of --images (default: 16)",
    )
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="height and width in pixels (default: the resolution of the model's config)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="FOLDER_OR_FILE",
        help="images to interpolate (the first two of a folder), or whose posteriors to sample; "
        "they are resized and cropped to --size",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        metavar="PATTERN",
        help="of folders, use only files that match these patterns (default: all)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        metavar="PATTERN",
        help="of folders, leave out files that match these patterns",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse images with more than N pixels, before decoding (default: 178956970)",
    )
    add_format_arguments(parser)
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="interpolation: images from one image to the next, both included (default: 9)",
    )
    parser.add_argument(
        "--lerp",
        dest="linear",
        action="store_true",
        default=None,
        help="interpolation: linear instead of on the arc (slerp)",
    )


def run(args: argparse.Namespace) -> int:
    """Call `kl_vae.sample` and print its result; return 1 if an image was skipped, else 0.

    Raises:
        ValueError: what the user can fix.
        RunError: a rank was lost.
    """
    from kl_vae.inference.sample import sample
    from kl_vae.runtime.files import display_name

    _check_together(args)
    result = sample(**keywords(sample, args))
    if os.environ.get("RANK", "0") != "0":
        return 0  # torchrun would end rank 0 while it prints
    if result.posterior_std:
        print(f"channel {'mean std':>10} {'smallest':>10} {'largest':>10}")
        columns = (result.posterior_std[key] for key in ("mean", "smallest", "largest"))
        for channel, values in enumerate(zip(*columns, strict=True)):
            print(f"{channel:>7}", *(f"{value:>10.4g}" for value in values))
    print(
        f"{len(result.files)} images in {display_name(result.folder)} (grid.png shows "
        f"{result.shown} of them)",
        flush=True,
    )
    return 1 if result.skipped else 0


def _check_together(args: argparse.Namespace) -> None:
    for key, users in USES.items():
        if getattr(args, key) and args.origin not in users:
            name = "lerp" if key == "linear" else key.replace("_", "-")
            raise ValueError(
                f"--{name}: not used by --from {args.origin}; leave it out, "
                f"or give --from {' or '.join(users)}"
            )
    if args.origin in OF_IMAGES and args.images is None:
        raise ValueError(f"--from {args.origin}: needs --images")
