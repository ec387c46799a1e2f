"""Compare checkpoints by what they lose of images; on one process or many, with torchrun."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from kl_vae.cli.arguments import (
    CHECKPOINT,
    add_image_arguments,
    add_speed_arguments,
    add_work_arguments,
)
from kl_vae.cli.work import loaded_units

if TYPE_CHECKING:
    from pathlib import Path

    from kl_vae.data import JoinedSource
    from kl_vae.inference.evaluation.config import EvaluateConfig
    from kl_vae.inference.evaluation.evaluator import Evaluator
    from kl_vae.inference.progress import Ledger
    from kl_vae.model import AutoEncoderKL
    from kl_vae.runtime.distributed import Ranks

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
    parser.add_argument(
        "--mode",
        choices=("mode", "sample"),
        default="mode",
        help="decode the posterior's mode (default) or a sample of it",
    )
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
    for name, what in (("features", "network's weights"), ("heads", "linear heads")):
        parser.add_argument(
            f"--lpips-{name}",
            metavar="FILE",
            help=f"the {what}, instead of the published ones, which are downloaded once",
        )
    parser.add_argument(
        "--fid-weights",
        metavar="FILE",
        help="those of rfid's network, instead of the published ones, which are downloaded once",
    )


def _add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, nargs="+", metavar="RUN_OR_FILE", help=f"each {CHECKPOINT}"
    )
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="of the checkpoints in the results (default: what differs in their paths)",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        help="config file or shipped config's name, one for all checkpoints or one each, where "
        f"{AS_IT_SAYS} is as the checkpoint says or shows (default: {AS_IT_SAYS})",
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="the weights as trained last, where a checkpoint has their moving average as well",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cuda:N, mps or cpu")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32"
    )
    add_speed_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate the checkpoints; 1 if any image was skipped, else 0.

    Raises:
        ValueError: what the user can mend; what was measured is kept for --resume.
        RunError: a rank was lost, or a data worker.
    """
    from kl_vae.cli.evaluation import finish, identity
    from kl_vae.data import resolve_root
    from kl_vae.inference.evaluation.evaluator import Evaluator
    from kl_vae.inference.evaluation.short_names import column_names
    from kl_vae.inference.load import load_model_on
    from kl_vae.inference.progress import Ledger, units_of
    from kl_vae.inference.reconstruction.reconstructor import unit_size
    from kl_vae.runtime.distributed import COMMAND, connect

    names, configs = column_names(args.checkpoint, args.names), _configs(args)
    out = resolve_root(args.out)
    # ranks wait for the slowest
    with connect(args.device, timeout_seconds=86_400, mends=COMMAND) as ranks:
        # weights that are missing are noticed first
        networks = _lpips(args, ranks), _inception(args, ranks)
        models = [
            load_model_on(ranks, checkpoint, config, not args.no_ema, args.fast, args.compile)
            for checkpoint, config in zip(args.checkpoint, configs, strict=True)
        ]
        config = _config(args, models, names)
        # once, so that the ranks share out the same list
        source = ranks.on_first(lambda: _open(args, out, models[0]))
        evaluator = Evaluator(models, names, source, config, args.batch_size, *networks)
        units = units_of(len(source), unit_size(len(source)))
        ledger = Ledger(out, identity(args, models, source, config), args.resume, ranks)
        _work(args, evaluator, config, source, units, ledger, ranks)
        ranks.gather(None)  # all are done
        # the others wait: torchrun ends all ranks as soon as one ends with 1
        return ranks.on_first(
            lambda: finish(args, out, names, models, source, config, len(units), ledger)
        )


def _configs(args: argparse.Namespace) -> list[str | None]:
    number = len(args.checkpoint)
    configs = args.config or [AS_IT_SAYS]
    if len(configs) not in (1, number):
        raise ValueError(
            f"--config: {len(configs)} for {number} checkpoints; give one for all, or one each"
        )
    if len(configs) == 1:
        configs = configs * number
    return [None if config == AS_IT_SAYS else config for config in configs]


def _lpips(args: argparse.Namespace, ranks: Ranks) -> Any:
    if "lpips" not in args.metrics:
        return None
    from kl_vae.metrics.perceptual import load_lpips

    files = args.lpips_features, args.lpips_heads
    try:
        return load_lpips(args.lpips_net, *files, ranks.device)
    except ValueError as error:
        raise ValueError(
            f"{error} (here as --lpips-features FILE --lpips-heads FILE; or leave lpips out of "
            "--metrics)"
        ) from error


def _inception(args: argparse.Namespace, ranks: Ranks) -> Any:
    if "rfid" not in args.metrics:
        return None
    from kl_vae.metrics.fid import find_inception, load_inception

    # first on one: the others find what it has downloaded, or those of another machine download it
    ranks.on_first(lambda: find_inception(args.fid_weights))
    return load_inception(find_inception(args.fid_weights), ranks.device)


def _config(
    args: argparse.Namespace, models: list[AutoEncoderKL], names: list[str]
) -> EvaluateConfig:
    from kl_vae.inference.evaluation.config import EvaluateConfig, choose_size

    resize, crop = choose_size(models, names, args.resize, args.crop, args.whole)
    metrics = tuple(metric for metric in METRICS if metric in args.metrics)
    return EvaluateConfig(resize, crop, args.mode, args.seed, args.precision, metrics)


def _open(args: argparse.Namespace, out: Path, model: AutoEncoderKL) -> JoinedSource:
    from kl_vae.inference.evaluation.files import FILES, RESULTS
    from kl_vae.inference.sources import open_sources
    from kl_vae.runtime.outputs import check_output_folder, check_outputs

    channels = model.config.in_channels
    source, folders = open_sources(
        args.images, channels, args.include, args.exclude, args.max_pixels
    )
    check_output_folder(out, folders)
    check_outputs(out, FILES, source.files, earlier=RESULTS)
    _ = source.fingerprint  # goes to the other ranks with it
    return source


def _work(
    args: argparse.Namespace,
    evaluator: Evaluator,
    config: EvaluateConfig,
    source: JoinedSource,
    units: list[range],
    ledger: Ledger,
    ranks: Ranks,
) -> None:
    """Do this rank's units."""
    from tqdm import tqdm

    from kl_vae.inference.evaluation.images import write_features

    size = {"resize": config.resize, "crop": config.crop, "num_workers": args.num_workers}
    with loaded_units(source, units, ledger, ranks, **size) as loaded:
        for unit, images in loaded:
            record, features = evaluator.unit(images)
            for index, reason in record["skipped"]:
                tqdm.write(f"skipped {source.name(index)}: {reason}", file=sys.stderr)
            if features is not None:
                write_features(ledger.path(unit, ".npy"), features)
            ledger.write(unit, record)
