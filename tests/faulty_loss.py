"""A loss that goes wrong where the environment says so; tests copy it to where a run imports it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kl_vae.losses.elbo import ELBO


class FaultyELBO(ELBO):
    """The plain loss, but for what FAULTS names: `WHAT@SPLIT:STEP` or `WHAT@SPLIT:STEP:RANK`, ...

    STEP may be `*`. WHAT is one of

        nan     the loss is not a number
        boom    an error
        spoil   a parameter becomes infinite, which changes no loss
        drift   a parameter moves a little, which changes no loss
        wait    nothing goes on as long as the file gate_PID is there
    """

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.idle = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posterior: Any,
        global_step: int,
        last_layer: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rank = os.environ.get("RANK", "0")
        places = {f"{split}:{step}{end}" for step in (global_step, "*") for end in ("", f":{rank}")}
        for fault in os.environ.get("FAULTS", "").split():
            what, _, place = fault.partition("@")
            if place not in places:
                continue
            if what == "nan":
                reconstructions = reconstructions * float("nan")
            elif what == "boom":
                raise RuntimeError("boom")
            elif what == "spoil":
                self.idle[1] = float("inf")
            elif what == "drift":
                self.idle += 1e-3
            elif what == "wait":
                gate = Path(f"gate_{os.getpid()}")
                gate.touch()
                while gate.exists():
                    time.sleep(0.01)
            else:
                raise AssertionError(fault)
        return super().forward(inputs, reconstructions, posterior, global_step, last_layer, split)
