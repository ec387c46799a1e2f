"""Muon with products in TF32, as on GPUs, and in bf16: quality after the same steps as in float32.

Only the orthogonalisation of the updates changes: the operands of its products are rounded to the
mantissa of TF32 or bf16, and the sums are float32. Overrides of the config follow the options.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import argument_parser, parse, report
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kl_vae
from kl_vae.optim import muon
from kl_vae.training.config import RunConfig

MANTISSA_BITS = {"fp32": 23, "tf32": 10, "bf16": 7}
PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
COLUMNS = {
    "products": "{variant}",
    "loss": "{val/total_loss}",
    "PSNR, dB": "{val/psnr}",
    "SSIM": "{val/ssim}",
}
DIGITS = {"val/total_loss": 5, "val/psnr": 2, "val/ssim": 4}


class RoundedProducts(TorchDispatchMode):
    """Rounds the operands of batched matrix products, to nearest, to `bits` of the mantissa."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in PRODUCTS:
            args = (*args[:-2], *(rounded(x, self.bits) for x in args[-2:]))
        return func(*args, **(kwargs or {}))


def rounded(x: Tensor, bits: int) -> Tensor:
    """Return x, float32, with `bits` bits of the mantissa; ties are rounded away from zero."""
    drop = 23 - bits
    half = 1 << (drop - 1) if drop else 0
    return ((x.contiguous().view(torch.int32) + half) >> drop << drop).view(torch.float32)


def orthogonalize(matrices: Tensor, bits: int) -> Tensor:
    """Call Muon's function with rounded operands."""
    with RoundedProducts(bits):
        return ORTHOGONALIZE(matrices)


ORTHOGONALIZE = muon.orthogonalize


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train with each precision and seed, and report the validations; return the rows."""
    parser = argument_parser(__doc__, repeats=1)
    parser.set_defaults(config="quickstart")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    args = parse(parser, argv)
    if RunConfig.load(args.config, args.overrides).optimizer.name != "muon":
        parser.error(f"{args.config}: trains without Muon; add optimizer.name=muon")

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in MANTISSA_BITS}
    for seed in range(args.seeds):
        for precision, validations in found.items():
            overrides = [f"training.seed={seed}", f"training.max_steps={args.steps}"]
            overrides += [f"training.validate_every_steps={args.steps}", *args.overrides]
            replaced = partial(orthogonalize, bits=MANTISSA_BITS[precision])
            with mock.patch.object(muon, "orthogonalize", replaced):
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
