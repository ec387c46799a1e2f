"""Reading a checkpoint and each of its weights once, against a model that is there already.

The files have just been written: the system holds them in memory, and what is measured is what is
done with them. `from_checkpoint` builds the model as well, which the baseline has already.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Architecture, alternate, argument_parser, parse, report
from safetensors.torch import load_file

from kl_vae import AutoEncoderKL

COLUMNS = {
    "": "{variant}",
    "s": "{median:.3f}",
    "lowest to highest": "{low:.3f} to {high:.3f}",
    "ratio": "{ratio:.2f}",
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; return the rows."""
    args = parse(argument_parser(__doc__, repeats=9), argv)
    model = Architecture.of(args.config).build().to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        compvis, diffusers, ckpt = (Path(folder, x) for x in ("a.safetensors", "b", "c.ckpt"))
        model.save_compvis(compvis)
        model.save_pretrained(diffusers)
        torch.save({"state_dict": model.state_dict()}, ckpt)
        megabytes = compvis.stat().st_size / 1e6

        def baseline() -> None:
            model.load_state_dict(load_file(compvis))
            use(model)

        def own(path: Path) -> None:
            use(AutoEncoderKL.from_checkpoint(path).to(args.device))

        calls: dict[str, Callable[[], object]] = {
            "`safetensors.torch.load_file` and `load_state_dict`": baseline,
            "`from_checkpoint` of a CompVis file": partial(own, compvis),
            "`from_checkpoint` of a folder of diffusers'": partial(own, diffusers),
            "`from_checkpoint` of a `.ckpt` of torch's": partial(own, ckpt),
        }
        timings = alternate(calls, args.repeats, args.device)
    first = next(iter(timings.values())).median
    rows = [
        {"variant": name, **timing._asdict(), "ratio": timing.median / first}
        for name, timing in timings.items()
    ]
    heading = f"Reading {args.config} of {megabytes:.0f} MB, {args.repeats} of each, interleaved"
    report(args, heading, COLUMNS, rows)
    return rows


@torch.no_grad()
def use(model: AutoEncoderKL) -> None:
    """Read every weight: mapped ones are read only then."""
    for parameter in model.parameters():
        parameter.sum()


if __name__ == "__main__":
    main()
