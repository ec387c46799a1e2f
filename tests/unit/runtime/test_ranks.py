"""Joining the other ranks."""

from __future__ import annotations

import socket

import pytest

from kl_vae.runtime.distributed import connect
from kl_vae.runtime.errors import RunError


def test_ranks_that_do_not_come_are_not_waited_for_longer_than_the_time_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in group.items():
        monkeypatch.setenv(key, str(value))
    text = r"the ranks did not meet within training.timeout_seconds=1 \(.*\): start all of them"
    with pytest.raises(RunError, match=text), connect("cpu", timeout_seconds=1):
        pass


def test_alone_nobody_is_asked() -> None:
    with connect("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_rank_zero) == (0, 1, True)
        assert ranks.any_of(True, False) == [True, False]
        assert ranks.gather("a") == ["a"]
        assert ranks.on_rank_zero(lambda: 5) == 5
