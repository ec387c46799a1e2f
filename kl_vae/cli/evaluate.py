"""Measure and compare the reconstructions of checkpoints. Also runs under torchrun."""

from __future__ import annotations

import argparse
import os

from kl_vae.cli.arguments import (
    CHECKPOINT,
    add_device_arguments,
    add_image_arguments,
    add_lpips_files,
    add_mode_argument,
    add_no_ema_argument,
    add_ssim_argument,
    add_work_arguments,
    keywords,
)

HELP = "measure one checkpoint or several side by side: PSNR, SSIM, MS-SSIM, LPIPS, rFID, KL"

METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "rfid")
AS_IT_SAYS = "-"  # in place of a config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    _add_checkpoint_arguments(parser)
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="output folder, created if needed"
    )
    resolution = "the resolution of the models' configs"
    add_image_arguments(parser, resize="the crop", crop=resolution)
    parser.add_argument(
        "--whole", action="store_true", help="use whole images of any size instead of a crop"
    )
    add_work_arguments(parser, "reconstructs")
    add_mode_argument(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of samples (default: 0)"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=("psnr", "ssim", "ms_ssim"),
        help="metrics besides KL and latent statistics (default: psnr ssim ms_ssim)",
    )
    add_ssim_argument(parser)
    parser.add_argument(
        "--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg", help="default: vgg"
    )
    add_lpips_files(parser)
    parser.add_argument(
        "--fid-weights",
        metavar="FILE",
        help="local weight file of the rFID network (default: downloaded once)",
    )


def _add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        dest="checkpoints",
        required=True,
        nargs="+",
        metavar="RUN_OR_FILE",
        help=f"each {CHECKPOINT}",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="names of the checkpoints in the results (default: the differing parts of paths)",
    )
    parser.add_argument(
        "--config",
        dest="configs",
        nargs="+",
        type=lambda text: None if text == AS_IT_SAYS else text,
        metavar="FILE",
        help="config file or shipped config's name, one for all checkpoints or one each, where "
        f"{AS_IT_SAYS} is as the checkpoint says or shows (default: {AS_IT_SAYS})",
    )
    add_no_ema_argument(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Call `kl_vae.evaluate` and print its result; return 1 if an image was skipped, else 0.

    Raises:
        ValueError: what the user can fix; finished measurements are kept for --resume.
        RunError: a rank or a data worker was lost.
    """
    from kl_vae.inference.evaluate import evaluate
    from kl_vae.inference.evaluation_report import TABLE
    from kl_vae.runtime.files import display_name

    result = evaluate(**keywords(evaluate, args))
    if os.environ.get("RANK", "0") != "0":
        return 0  # torchrun would end rank 0 while it prints
    assert result.folder is not None
    print(result.table())
    print(
        f"evaluated {_counted(len(result.models), 'checkpoint')} on "
        f"{_counted(result.count, 'image')}, {result.size}: {display_name(result.folder / TABLE)}",
        flush=True,
    )
    return 1 if result.skipped else 0


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
