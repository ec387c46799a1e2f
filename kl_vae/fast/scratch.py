"""Memory for what is soon forgotten.

To get new pages from the system takes several times as long as to write to them, and the C library
gives large pieces back as soon as they are freed.
"""

from __future__ import annotations

from math import prod
from threading import local

import torch
from torch import Tensor

_KEPT = local()


def scratch(use: str, *shape: int) -> Tensor:
    """A float32 tensor on the CPU, of any content, that is valid until the next call for its `use`.

    For each thread and use the largest one so far is kept.
    """
    kept: Tensor | None = getattr(_KEPT, use, None)
    if kept is None or kept.numel() < prod(shape):
        with torch.inference_mode(False):  # then it can be used in that mode and out of it
            kept = torch.empty(prod(shape), dtype=torch.float32, device="cpu")
        setattr(_KEPT, use, kept)
    return kept[: prod(shape)].view(shape)
