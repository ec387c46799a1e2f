"""Muon in bf16, as on GPUs, against float32: the quality after the same steps, over several seeds.

Only the orthogonalisation of the updates changes. Overrides of the config follow the options.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from common import DTYPES, argument_parser, parse, report

import kl_vae
from kl_vae.optim import muon

COLUMNS = {
    "orthogonalization": "{variant}",
    "loss": "{val/total_loss}",
    "PSNR, dB": "{val/psnr}",
    "SSIM": "{val/ssim}",
}
DIGITS = {"val/total_loss": 5, "val/psnr": 2, "val/ssim": 4}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train with each precision and seed, and report the validations; return the rows."""
    parser = argument_parser(__doc__, repeats=1)
    parser.set_defaults(config="quickstart")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    args = parse(parser, argv)

    found: dict[str, list[dict[str, Any]]] = {"fp32": [], "bf16": []}
    for seed in range(args.seeds):
        for precision, validations in found.items():
            overrides = [f"training.seed={seed}", f"training.max_steps={args.steps}"]
            overrides += [f"training.validate_every_steps={args.steps}", *args.overrides]
            with mock.patch.object(muon, "compute_dtype", lambda _, p=precision: DTYPES[p]):
                result = kl_vae.train(
                    args.config,
                    args.out / f"{precision}_seed{seed}",
                    overrides=overrides,
                    device=str(args.device),
                )
            validations.append(result.metrics)
    rows = [
        {"variant": precision, "seeds": validations}
        | {key: summary([v[key] for v in validations], digits) for key, digits in DIGITS.items()}
        for precision, validations in found.items()
    ]
    heading = f"{args.config} after {args.steps} steps, mean ± deviation of {args.seeds} seeds"
    report(args, heading, COLUMNS, rows)
    return rows


def summary(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
