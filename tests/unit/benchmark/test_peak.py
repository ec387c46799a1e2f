"""The memory and time of a call in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from kl_vae.benchmark.peak import cost_of
from kl_vae.runtime.errors import RunError

CPU = torch.device("cpu")
MEGABYTE = 2**20


def prepare(work: str) -> Callable[[], object]:
    """What the other process calls; a function of a module, so that it can be sent there."""
    torch.ones(400 * MEGABYTE // 4)  # what loading takes is not the call's
    kept = torch.ones(50 * MEGABYTE // 4)

    def call() -> None:
        assert torch.get_num_threads() == 1 and len(kept)
        if work == "allocate":
            torch.ones(200 * MEGABYTE // 4)
            torch.ones(100 * MEGABYTE // 4)
            time.sleep(0.1)
        elif work == "fail":
            raise ValueError("a\nb")
        else:
            os._exit(9)

    return call


def test_what_a_call_adds_at_most() -> None:
    cost = cost_of(partial(prepare, "allocate"), CPU, threads=1)
    assert 190 * MEGABYTE < cost.peak - cost.before < 260 * MEGABYTE
    assert cost.before > 50 * MEGABYTE
    assert 0.1 < cost.seconds < 20.0


def test_a_call_that_fails_is_said() -> None:
    with pytest.raises(RunError, match="a measurement failed: ValueError: a b"):
        cost_of(partial(prepare, "fail"), CPU, threads=1)


def test_a_call_that_is_killed_is_said() -> None:
    text = r"a measurement ended without a word \(exit code 9\): mostly memory ran out; give"
    with pytest.raises(RunError, match=text):
        cost_of(partial(prepare, "exit"), CPU, threads=1)
