"""Messages of errors that end a run."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from kl_vae.runtime import distributed
from kl_vae.runtime.distributed import COMMAND, TRAINING, Hints, RankMonitor, explain
from kl_vae.runtime.errors import RunError
from tests.messages import is_about

# each error, and what its message names
KNOWN: list[tuple[Exception, list[str]]] = [
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), ["pid 5", "workers"]),
    (ConnectionResetError(104, "Connection reset by peer"), ["[Errno 104]", "workers"]),
    (EOFError(), ["EOFError", "workers"]),
    (RuntimeError("DataLoader timed out after 3 seconds"), ["after 3", "timeout", "images"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), ["2 GiB", "memory"]),
    (OSError(24, "Too many open files", "a/b"), ["a/b", "ulimit -n", "workers"]),
    (OSError(23, "Too many open files in system"), ["ulimit -n", "workers"]),
    (RuntimeError("received 0 items of ancdata"), ["ancdata", "ulimit -n", "resume"]),
    (RuntimeError("unable to open </torch_1>: Too many open files (24)"), ["ulimit -n"]),
    (OSError(28, "No space left on device", "a/b"), ["No space left on device: 'a/b'"]),
]


@pytest.mark.parametrize("hints", [TRAINING, COMMAND], ids=["training", "command"])
@pytest.mark.parametrize(("error", "named"), KNOWN)
def test_known_errors_name_the_setting(error: Exception, named: list[str], hints: Hints) -> None:
    explained = explain(error, None, hints)
    assert isinstance(explained, RunError)
    for name in named:
        assert getattr(hints, name, name) in str(explained)


def test_the_limit_on_open_files_is_named_behind_the_error_that_it_caused() -> None:
    try:
        try:
            raise OSError(24, "Too many open files")
        except OSError:
            raise EOFError from None
    except EOFError as error:
        text = str(explain(error))
    assert is_about(text, "ulimit -n") and "/dev/shm" not in text


@pytest.mark.parametrize(
    "error", [ValueError("a=1: b"), RunError("c"), RuntimeError("gloo"), KeyError()]
)
def test_other_errors_are_unchanged(error: Exception) -> None:
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
    assert is_about(str(explained), "rank 1", "'boom'", hints.resume, "[../gloo")
    assert explain(explained, one, hints) is explained  # unchanged when explained again


def test_ranks_that_ended_without_an_error_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.2)
    store = HashStore()
    two = RankMonitor(store, 2, 4)
    explain(dist.DistBackendError("nccl"), RankMonitor(store, 0, 4))
    explained = explain(dist.DistBackendError("nccl"), two)
    assert is_about(str(explained), "ranks 1, 3")


def test_a_lost_connection_between_running_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.2)
    store = HashStore()
    explain(dist.DistBackendError("nccl"), RankMonitor(store, 0, 2))
    explained = explain(dist.DistBackendError("nccl"), RankMonitor(store, 1, 2))
    assert is_about(str(explained), "connection", "network")
