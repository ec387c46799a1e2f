"""What is said about an error that ends a run."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from kl_vae.runtime import distributed
from kl_vae.runtime.distributed import COMMAND, TRAINING, Hints, RankMonitor, explain
from kl_vae.runtime.errors import RunError

# each error, and what its message names
KNOWN: list[tuple[Exception, list[str]]] = [
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), ["pid 5", "workers"]),
    (ConnectionResetError(104, "Connection reset by peer"), ["[Errno 104]", "workers"]),
    (EOFError(), ["EOFError", "workers"]),
    (RuntimeError("DataLoader timed out after 3 seconds"), ["after 3", "timeout", "images"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), ["2 GiB", "memory"]),
    (OSError(28, "No space left on device", "a/b"), ["No space left on device: 'a/b'"]),
]


@pytest.mark.parametrize("hints", [TRAINING, COMMAND], ids=["training", "command"])
@pytest.mark.parametrize(("error", "named"), KNOWN)
def test_known_causes_name_what_to_change(error: Exception, named: list[str], hints: Hints) -> None:
    explained = explain(error, None, hints)
    assert isinstance(explained, RunError)
    for name in named:
        assert getattr(hints, name, name) in str(explained)


@pytest.mark.parametrize(
    "error", [ValueError("a=1: b"), RunError("c"), RuntimeError("gloo"), KeyError()]
)
def test_others_stay_as_they_are(error: Exception) -> None:
    assert explain(error) is error


@pytest.mark.parametrize("hints", [TRAINING, COMMAND], ids=["training", "command"])
def test_the_rank_that_failed_first_is_named_with_its_reason(hints: Hints) -> None:
    store = HashStore()
    one, other = RankMonitor(store, 0, 2), RankMonitor(store, 1, 2)
    boom = KeyError("boom")
    assert explain(boom, other, hints) is boom
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    explained = explain(lost, one, hints)
    assert isinstance(explained, RunError)
    assert str(explained).startswith(f"rank 1 failed: 'boom'; {hints.resume} ([../gloo")
    assert explain(explained, one, hints) is explained  # and so at each level that it passes


def test_ranks_that_leave_no_reason_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.2)
    store = HashStore()
    two = RankMonitor(store, 2, 4)
    explain(dist.DistBackendError("nccl"), RankMonitor(store, 0, 4))  # lost one as well
    explained = explain(dist.DistBackendError("nccl"), two)
    assert str(explained).startswith("ranks 1, 3 ended without a message, or stopped responding")


def test_if_all_ranks_are_there_the_network_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.2)
    store = HashStore()
    explain(dist.DistBackendError("nccl"), RankMonitor(store, 0, 2))
    explained = explain(dist.DistBackendError("nccl"), RankMonitor(store, 1, 2))
    assert "the connection between the ranks was lost: check the network" in str(explained)
