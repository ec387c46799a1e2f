"""A command on simulated GPUs: `python child.py FILE COMMAND ARGUMENTS...`.

Rank 0 writes counts to FILE, in JSON: of each training step (`steps`), of each mean over the ranks
(`lines`, one per log line), and of the whole command (`command`). All numbers that a device
computes are 0: weights stay as they were set.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kl_vae.cli.main import main
from kl_vae.runtime.distributed import Ranks
from kl_vae.training.state import TrainingState
from kl_vae.training.step import TrainingStep
from tests.simulated_gpu import operations
from tests.simulated_gpu.counts import count_collectives, counted

found: dict[str, list[Any]] = {"steps": [], "lines": [], "command": []}


def measured(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Return the function, which also appends the counts of each call to `found[kind]`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with counted() as counts:
            result = function(*args, **kwargs)
        found[kind].append(dataclasses.asdict(counts))
        return result

    return call


if __name__ == "__main__":
    operations.install()
    count_collectives()
    TrainingStep.__call__ = measured(TrainingStep.__call__, "steps")  # type: ignore[method-assign]
    Ranks.mean = measured(Ranks.mean, "lines")  # type: ignore[method-assign]
    TrainingState.not_finite = lambda self: None  # type: ignore[method-assign]  # a flag that is 0
    code = measured(main, "command")([*sys.argv[2:], "--device", "cuda"])
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))
    sys.exit(code)
