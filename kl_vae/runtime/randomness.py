"""Random generators that depend on a key only, never on worker, rank or wall clock."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def generator_for(*key: int | str) -> torch.Generator:
    """Return a CPU generator whose stream is a function of `key` alone.

    The key is a purpose and the integers that name one draw, such as
    `("augment", seed, epoch, index)`: the same key gives the same numbers in
    every process, on every machine, in any order of draws.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # manual_seed takes a signed 64-bit integer
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def normal_noise(shape: Sequence[int], *key: str | int) -> torch.Tensor:
    """Return standard normal noise of `shape`, float32 on the CPU: a function of the key alone."""
    return torch.randn(tuple(shape), generator=generator_for(*key))
