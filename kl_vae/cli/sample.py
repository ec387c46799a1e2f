"""Decode latents drawn from the prior N(0, I).

A KL autoencoder with a small kl_weight is no generator: expect texture without things.
"""

import argparse
import math

from kl_vae.cli.arguments import add_model_arguments, add_picture_arguments, positive

HELP = "decode latents drawn from N(0, I), to see what the prior holds"

GRID_IMAGES = 64  # at most, in grid.png


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_arguments(parser)
    add_picture_arguments(parser)
    parser.add_argument(
        "--number", type=positive, default=16, metavar="N", help="images to draw (default: 16)"
    )
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="their side in pixels (default: the resolution of the model's config)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="images decoded at once; changes no image (default: 8)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the samples and grid.png; 0.

    Raises:
        ValueError: what the user can mend; nothing has been written then, unless writing failed.
    """
    from tqdm import tqdm

    from kl_vae.data import display_name, resolve_root
    from kl_vae.device import choose_device
    from kl_vae.inference.grid import image_grid, save_png
    from kl_vae.inference.load import load_model
    from kl_vae.inference.outputs import check_output_folder
    from kl_vae.inference.picture_files import as_picture, as_saved, image_suffix, save_image
    from kl_vae.inference.sample import check_size, sample_prior

    out = resolve_root(args.out)
    check_output_folder(out)
    model = load_model(
        args.checkpoint, args.config, choose_device(args.device), ema=not args.no_ema
    )
    size = model.config.resolution if args.size is None else args.size
    check_size(size, model.downsampling_factor)
    samples = sample_prior(model, args.number, size, args.seed, args.batch_size, args.precision)
    suffix = image_suffix(model.config.out_ch)
    shown = []
    for i, sample in enumerate(tqdm(samples, total=args.number, unit="image", disable=None)):
        image = as_saved(sample)
        save_image(out / f"sample_{i:05d}{suffix}", image)
        if i < GRID_IMAGES:
            shown.append(as_picture(image, model.to_rgb))
    columns = math.ceil(math.sqrt(len(shown)))
    save_png(out / "grid.png", image_grid(shown, columns))
    print(f"{args.number} samples in {display_name(out)} (grid.png shows {len(shown)} of them)")
    return 0
