"""Muon on several ranks: how even the work is, and what the ranks exchange.

The time of each shape is measured on this machine; the ranks are not started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import Architecture, alternate, argument_parser, parse, report
from torch import Tensor

from kl_vae.optim.config import OptimizerConfig, build_optimizer
from kl_vae.optim.muon import assign, orthogonalize

COLUMNS = {
    "ranks": "{ranks}",
    "heaviest rank / mean": "{load:.2f}",
    "largest matrix / mean": "{largest:.2f}",
    "bytes received per rank": "{bytes:,}",
    "of the parameters' bytes": "{share:.2f}",
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; return the rows."""
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    args = parse(parser, argv)

    with torch.device("meta"):
        parameters = list(Architecture.of(args.config).build().parameters())
    optimizer = build_optimizer(parameters, OptimizerConfig(name="muon"))
    (matrices,) = (g["params"] for g in optimizer.param_groups if g["orthogonalize"])
    shapes = Counter(map(matrix_shape, matrices))
    calls = {
        f"{rows} x {columns}": partial(
            orthogonalize, torch.randn(1, rows, columns, device=args.device)
        )
        for rows, columns in shapes
    }
    timings = alternate(calls, args.repeats, args.device)
    seconds = dict(zip(shapes, (timings[name].median for name in calls), strict=True))
    values, stored = (sum(p.numel() for p in x) for x in (matrices, parameters))

    rows = []
    for ranks in args.ranks:
        loads = [
            sum(seconds[matrix_shape(p)] for stack in share for p in stack)
            for share in assign(matrices, ranks)
        ]
        mean = sum(loads) / ranks
        row = {"ranks": ranks, "load": max(loads) / mean, "largest": max(seconds.values()) / mean}
        rows.append(row | {"bytes": 4 * values, "share": values / stored})
    notes = [
        f"Each rank receives one value per entry of the {len(matrices)} matrices, {values:,} of "
        f"{stored:,} parameters. All matrices take {sum(loads):.3g} s on this device."
    ]
    heading = f"Muon's work and exchange for {args.config}, time of each shape measured"
    report(args, heading, COLUMNS, rows, notes)
    return rows


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """Return the shape of the matrix that Muon makes of a parameter."""
    return x.shape[0], x[0].numel()


if __name__ == "__main__":
    main()
