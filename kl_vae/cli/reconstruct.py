"""Encode and decode images, on one process or with torchrun on many, and measure what is lost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from kl_vae.cli.reconstruct_arguments import add_arguments
from kl_vae.cli.work import loaded_units

if TYPE_CHECKING:
    from pathlib import Path

    from kl_vae.data import Source
    from kl_vae.inference.progress import Ledger
    from kl_vae.inference.reconstruction.background import Background
    from kl_vae.inference.reconstruction.config import ReconstructConfig
    from kl_vae.inference.reconstruction.figures import Perceptual
    from kl_vae.inference.reconstruction.reconstructor import Reconstructor
    from kl_vae.model import AutoEncoderKL
    from kl_vae.runtime.distributed import Ranks
    from kl_vae.visual.image_files import PictureFormat

__all__ = ["HELP", "add_arguments", "run"]

HELP = "reconstruct images, with PSNR, SSIM, a comparison picture and a page of all"


def run(args: argparse.Namespace) -> int:
    """Reconstruct images; 1 if any was skipped, else 0.

    Raises:
        ValueError: what the user can mend; nothing has been written then, unless writing failed.
        RunError: a rank was lost, or a data worker.
    """
    from kl_vae.data import resolve_root
    from kl_vae.inference.load import load_model_on, model_fingerprint
    from kl_vae.inference.progress import Ledger, units_of
    from kl_vae.inference.reconstruction.output_files import OutputFiles
    from kl_vae.inference.reconstruction.reconstructor import Reconstructor, unit_size
    from kl_vae.inference.reconstruction.results import Results
    from kl_vae.inference.reconstruction.summary import Report, begin_report
    from kl_vae.inference.tiling import check_tiling
    from kl_vae.runtime.distributed import COMMAND, connect
    from kl_vae.visual.image_files import PictureFormat

    config = _config(args)
    picture_format = PictureFormat(args.format, args.quality)
    out = resolve_root(args.out)
    # ranks wait for the slowest
    with connect(args.device, timeout_seconds=86_400, mends=COMMAND) as ranks:
        model = load_model_on(
            ranks, args.checkpoint, args.config, not args.no_ema, args.fast, args.compile
        )
        check_tiling(model, config.tiling)
        perceptual = _perceptual(args, model, ranks)
        # once, so that the ranks share out the same list
        source = ranks.on_first(lambda: _open(args, out, model))
        files = OutputFiles.of(out, source, picture_format, gallery=not args.no_gallery)
        units = units_of(len(source), unit_size(len(source)))
        about = _about(args, config, picture_format, ranks)
        identity = {
            **about,
            "weights": model_fingerprint(model),
            "source": source.fingerprint,
            "gallery": files.gallery,
        }
        ranks.on_first(lambda: files.prepare(source))
        ledger = Ledger(out, identity, args.resume, ranks)
        ranks.on_first(lambda: begin_report(files))
        reconstructor = partial(Reconstructor, model, source, files, config, perceptual)
        _do_units(args, reconstructor, source, units, ledger, ranks)
        ranks.gather(None)  # all units are done

        def finish() -> bool:
            results = Results.of(ledger.read(len(units)))
            line = Report(source, files, model.to_rgb, about).write(results, args.grid_size)
            ledger.close()
            print(line, flush=True)
            return bool(results.skipped)

        # the others wait: torchrun ends all ranks as soon as one ends with 1
        return 1 if ranks.on_first(finish) else 0


def _config(args: argparse.Namespace) -> ReconstructConfig:
    from kl_vae.inference.reconstruction.config import ReconstructConfig
    from kl_vae.inference.tiling import Tiling

    return ReconstructConfig(
        args.resize,
        args.crop,
        args.mode,
        args.seed,
        args.precision,
        args.max_pixels,
        args.batch_size,
        Tiling(args.tiling, args.tile, args.overlap),
    )


def _perceptual(args: argparse.Namespace, model: AutoEncoderKL, ranks: Ranks) -> Perceptual | None:
    if args.lpips == "none":
        if args.lpips_features or args.lpips_heads:
            raise ValueError("--lpips-features, --lpips-heads: say of which --lpips they are")
        return None
    from kl_vae.metrics.perceptual import load_lpips

    if model.config.in_channels != 3:
        raise ValueError(
            f"--lpips={args.lpips}: compares images of 3 channels, and the model has "
            f"{model.config.in_channels}; leave it out"
        )
    try:
        return load_lpips(args.lpips, args.lpips_features, args.lpips_heads, ranks.device)
    except ValueError as error:
        raise ValueError(
            f"{error} (here as --lpips-features FILE --lpips-heads FILE; or leave --lpips out)"
        ) from error


def _open(args: argparse.Namespace, out: Path, model: AutoEncoderKL) -> Source:
    from kl_vae.inference.sources import open_sources
    from kl_vae.runtime.outputs import check_output_folder

    source, folders = open_sources(
        args.images, model.config.in_channels, args.include, args.exclude, args.max_pixels
    )
    check_output_folder(out, folders)
    _ = source.fingerprint  # goes to the other ranks with it
    return source


def _about(
    args: argparse.Namespace, config: ReconstructConfig, picture_format: PictureFormat, ranks: Ranks
) -> dict[str, Any]:
    """What the results depend on, as summary.json begins."""
    from kl_vae.runtime.files import display_name

    return {
        "checkpoint": display_name(args.checkpoint),
        "images": [display_name(root) for root in args.images],
        **asdict(config),
        "format": picture_format.name,
        "quality": picture_format.quality,
        "fast": args.fast,
        "compile": args.compile,
        "lpips": args.lpips,
        "device": ranks.device.type,
    }


def _do_units(
    args: argparse.Namespace,
    make: Callable[[Background, Callable[[str], None]], Reconstructor],
    source: Source,
    units: Sequence[range],
    ledger: Ledger,
    ranks: Ranks,
) -> None:
    """Do this rank's part of the units."""
    from tqdm import tqdm

    from kl_vae.inference.reconstruction.background import Background

    size = {"resize": args.resize, "crop": args.crop, "num_workers": args.num_workers}
    with (
        Background(args.num_workers) as background,
        loaded_units(source, units, ledger, ranks, **size) as loaded,
    ):
        reconstructor = make(background, lambda line: tqdm.write(line, file=sys.stderr))
        for unit, images in loaded:
            ledger.write(unit, reconstructor.do(images))
