"""Decode latents of the prior N(0, I), of a fitted Gaussian, between images, or of posteriors.

A KL autoencoder with a small kl_weight is no generator: of N(0, I) expect texture without things.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kl_vae.cli.sample_arguments import add_sample_arguments, check_together

if TYPE_CHECKING:
    from kl_vae.cli.sample_plans import Plan
    from kl_vae.inference.progress import Ledger
    from kl_vae.runtime.distributed import Ranks

HELP = "decode latents drawn from N(0, I), a fitted Gaussian or posteriors, or between images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_sample_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the pictures and grid.png; 1 if an image was skipped, else 0.

    Raises:
        ValueError: what the user can mend; what was drawn before is kept for --resume.
        RunError: a rank was lost.
    """
    from kl_vae.cli.sample_plans import plan_for
    from kl_vae.data import resolve_root
    from kl_vae.inference.load import load_model_on, model_fingerprint
    from kl_vae.inference.sampling.canvas import Canvas
    from kl_vae.inference.sampling.prior import check_size
    from kl_vae.inference.tiling import Tiling
    from kl_vae.runtime.distributed import COMMAND, connect
    from kl_vae.runtime.outputs import check_output_folder

    check_together(args)
    tiling = Tiling(args.tiling, args.tile, args.overlap)
    out = resolve_root(args.out)
    with connect(args.device, timeout_seconds=86_400, mends=COMMAND) as ranks:
        ranks.on_first(lambda: check_output_folder(out))
        model = load_model_on(
            ranks, args.checkpoint, args.config, not args.no_ema, args.fast, args.compile
        )
        size = model.config.resolution if args.size is None else args.size
        check_size(size, model.downsampling_factor)
        canvas = Canvas(model, out, size, args.precision, tiling)
        plan = plan_for(args, canvas, ranks)
        common = ("seed", "batch_size", "precision", "fast", "compile", "tiling", "tile", "overlap")
        identity = {
            "from": args.source,
            **{key: getattr(args, key) for key in common},
            "model": model_fingerprint(model),
            "size": size,
            **plan.identity,
        }
        return 1 if _draw(plan, out, identity, args.resume, ranks) else 0


def _draw(plan: Plan, out: Path, identity: dict[str, Any], resume: bool, ranks: Ranks) -> bool:
    """Do all units and write what follows of them; return whether an image was skipped."""
    from kl_vae.inference.progress import Ledger
    from kl_vae.runtime.files import remove_temporaries

    ranks.on_first(lambda: _check_outputs(plan, out))
    ledger = Ledger(out, identity, resume, ranks)
    ranks.on_first(lambda: remove_temporaries(out))  # of a killed command
    fit, drawing = plan.fit, plan.drawing
    first = 0
    if fit is not None:
        first = len(fit.sizes)
        _do(fit.do, 0, fit.sizes, "fit", ledger, ranks)
        fitted = list(ledger.read(first))
        ranks.on_first(lambda: fit.check(fitted, ledger))
        fit.finish(fitted, ledger)
    _do(drawing.draw, first, drawing.sizes, "draw", ledger, ranks)

    def finish() -> bool:
        records = list(ledger.read(first + len(drawing.sizes)))
        lines = drawing.finish(records[first:], ledger)
        ledger.close()
        print("\n".join(lines), flush=True)
        return any(record and record.get("skipped") for record in records)

    # the others wait: torchrun ends all ranks as soon as one ends with 1
    return ranks.on_first(finish)


def _check_outputs(plan: Plan, out: Path) -> None:
    from kl_vae.inference.progress import FOLDER
    from kl_vae.inference.sampling.canvas import GRID
    from kl_vae.runtime.outputs import check_output_folder, check_outputs

    check_output_folder(out, plan.folders)
    earlier = FOLDER if (out / FOLDER).exists() else GRID
    check_outputs(out, [*plan.drawing.names, GRID], plan.inputs, earlier)


def _do(
    work: Callable[[Sequence[int], Ledger], Iterator[Any]],
    first: int,
    sizes: Sequence[int],
    title: str,
    ledger: Ledger,
    ranks: Ranks,
) -> None:
    """Do this rank's part of the units from `first` on, and wait for the others."""
    from tqdm import tqdm

    own = [unit - first for unit in ledger.share(first + len(sizes)) if unit >= first]
    hidden = None if ranks.is_first else True  # None: no bar where stderr is a file
    total = sum(sizes[unit] for unit in own)
    with tqdm(total=total, unit="image", desc=title, disable=hidden) as progress:
        for unit, record in zip(own, work(own, ledger), strict=True):
            ledger.write(first + unit, record)
            progress.update(sizes[unit])
    ranks.gather(None)
