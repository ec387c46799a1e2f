"""Write an autoencoder's weights in the layout of others."""

import argparse

from kl_vae.cli.arguments import CHECKPOINT, add_overwrite_argument, add_weights_arguments, keywords

HELP = "convert a checkpoint to a diffusers folder or to one file with the original names"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("checkpoint", metavar="IN", help=CHECKPOINT)
    parser.add_argument(
        "out",
        metavar="OUT",
        help="output: a .safetensors file with --to compvis, a folder with --to diffusers",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("compvis", "diffusers"),
        help="compvis: one file with the original names (latent-diffusion, ComfyUI); diffusers: a "
        "folder for AutoencoderKL.from_pretrained",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="default: fp32"
    )
    add_weights_arguments(parser)
    add_overwrite_argument(parser, "an existing file or diffusers folder")


def run(args: argparse.Namespace) -> int:
    """Call `kl_vae.convert` and print what was written; return 0."""
    from kl_vae.inference.convert import convert

    result = convert(**keywords(convert, args))
    print(f"{result.parameters:,} parameters in {args.out} ({args.to}, {args.dtype})")
    return 0
