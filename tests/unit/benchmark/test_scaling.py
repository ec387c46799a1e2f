"""Ranks that share threads: the same step, and what follows from the times."""

import os
from functools import partial
from pathlib import Path

import pytest

from kl_vae.benchmark.groups import Actions, Group
from kl_vae.benchmark.scaling import Scaling
from kl_vae.benchmark.timing import Timing
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError


def at(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds)


def test_what_follows_by_hand() -> None:
    scaling = Scaling(2, 2, at(4.0), at(5.0), at(4.5), at(2.0), 1e-7)
    assert (scaling.speed, scaling.exposed, scaling.overlap) == (0.8, 0.5, 0.75)
    lines = scaling.markdown().splitlines()
    assert lines[2] == "| 1 rank x 2 threads | 4 | 4 to 4 | 1.000 |"
    assert lines[3] == "| 2 ranks x 1 thread | 5 | 5 to 5 | 0.800 |"
    assert lines[5] == "| an all-reduce of as many numbers, alone | 2 | 2 to 2 | |"
    assert lines[-1].startswith("The exchange adds 0.5 s to a step; 75% of it is hidden behind")
    hidden = Scaling(2, 2, at(4.0), at(4.4), at(4.5), at(2.0), 1e-7)
    assert (hidden.exposed, hidden.overlap) == (0.0, 1.0)


def prepare(work: str, ranks: Ranks) -> Actions:
    """What the processes of a group do; a function of a module, so that it can be sent there."""

    def fail() -> float:
        raise ValueError("a\nb")

    return {"rank": lambda: float(ranks.rank), "fail": fail, "exit": lambda: os._exit(9)}


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("fail", "rank 0 of a measurement failed: ValueError: a b"),
        ("exit", "a rank of a measurement ended without a word: mostly memory ran out; give small"),
    ],
)
def test_a_rank_that_fails_or_ends_is_said(tmp_path: Path, work: str, message: str) -> None:
    with Group(1, 1, partial(prepare, work), tmp_path / "store") as group:
        assert group.do("rank") == [0.0]
        with pytest.raises(RunError, match=message):
            group.do(work)
