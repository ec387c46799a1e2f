"""Joining the other ranks."""

from __future__ import annotations

import socket

import pytest

from kl_vae.runtime.distributed import connect
from kl_vae.runtime.errors import RunError
from tests.messages import mentions


def test_waiting_for_missing_ranks_times_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in group.items():
        monkeypatch.setenv(key, str(value))
    text = mentions("training.timeout_seconds=1", "MASTER_ADDR")
    with pytest.raises(RunError, match=text), connect("cpu", timeout_seconds=1):
        pass


def test_a_single_process_needs_no_communication() -> None:
    with connect("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_rank_zero) == (0, 1, True)
        assert ranks.any_of(True, False) == [True, False]
        assert ranks.gather("a") == ["a"]
        assert ranks.on_rank_zero(lambda: 5) == 5
