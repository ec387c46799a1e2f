"""Compare checkpoints by how well they reconstruct; on one process or many, with torchrun."""

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
        "--out", required=True, metavar="FOLDER", help="where the results go; is created"
    )
    resolution = "the resolution of the models' configs"
    add_image_arguments(parser, resize="the crop", crop=resolution)
    parser.add_argument(
        "--whole", action="store_true", help="whole images of any size, instead of a crop"
    )
    add_work_arguments(parser, "reconstructs")
    add_mode_argument(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of samples (default: 0)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=("psnr", "ssim", "ms_ssim"),
        help="what is measured (default: psnr ssim ms_ssim); KL and latents always are",
    )
    parser.add_argument(
        "--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg", help="default: vgg"
    )
    add_lpips_files(parser)
    parser.add_argument(
        "--fid-weights",
        metavar="FILE",
        help="those of rfid's network, instead of the published ones, which are downloaded once",
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
        help="of the checkpoints in the results (default: what differs in their paths)",
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
        ValueError: what the user can fix; what was measured is kept for --resume.
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
        f"{_counted(result.count, 'image')}: {display_name(result.folder / TABLE)}",
        flush=True,
    )
    return 1 if result.skipped else 0


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
