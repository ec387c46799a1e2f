"""What ended a run, in words."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from kl_vae.runtime import distributed as roll_call
from kl_vae.runtime.distributed import COMMAND, RollCall, explain
from kl_vae.runtime.errors import RunError

KNOWN: list[tuple[Exception, str]] = [
    (
        RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "),
        "a data worker ended (DataLoader worker (pid 5) is killed by signal: Killed.): mostly "
        "memory ran out (dmesg, free -h) or /dev/shm is full (df -h /dev/shm); lower "
        "data.num_workers, or give more of it",
    ),
    (
        ConnectionResetError(104, "Connection reset by peer"),
        "a data worker ended ([Errno 104] Connection reset by peer): mostly memory ran out (dmesg, "
        "free -h) or /dev/shm is full (df -h /dev/shm); lower data.num_workers, or give more of it",
    ),
    (
        EOFError(),
        "a data worker ended (EOFError): mostly memory ran out (dmesg, free -h) or /dev/shm is "
        "full (df -h /dev/shm); lower data.num_workers, or give more of it",
    ),
    (
        RuntimeError("DataLoader timed out after 3 seconds"),
        "the data workers gave no batch within training.timeout_seconds (DataLoader timed out "
        "after 3 seconds): look at the storage of data.train.root, or raise it",
    ),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "the memory of the GPU does not suffice (CUDA out of memory. Tried to allocate 2 GiB): "
        "set training.activation_checkpointing=blocks, or raise training.accumulate_batches",
    ),
    (
        OSError(28, "No space left on device", "a/b"),
        "[Errno 28] No space left on device: 'a/b'; mend it and give the same command again",
    ),
]


@pytest.mark.parametrize(("error", "text"), KNOWN)
def test_known_causes_say_what_to_do(error: Exception, text: str) -> None:
    failure = explain(error, None)
    assert isinstance(failure, RunError)
    assert str(failure) == text


def test_commands_are_mended_by_their_options() -> None:
    texts = [str(explain(error, None, COMMAND)) for error, _ in KNOWN]
    assert texts[0].endswith("lower --num-workers, or give more of it")
    assert texts[3].endswith("look at the storage of --images, or raise it")
    assert texts[4].endswith("lower --batch-size, or give --precision bf16")
    store = HashStore()
    explain(KeyError("boom"), RollCall(store, 1, 2), COMMAND)
    lost = explain(RuntimeError("gloo"), RollCall(store, 0, 2), COMMAND)
    assert str(lost).endswith("; the same command with --resume goes on where it was (gloo)")


@pytest.mark.parametrize(
    "error", [ValueError("a=1: b"), RunError("c"), RuntimeError("gloo"), KeyError()]
)
def test_others_stay_what_they_are(error: Exception) -> None:
    assert explain(error, None) is error


def test_the_rank_that_failed_first_is_named_with_its_reason() -> None:
    store = HashStore()
    one, other = RollCall(store, 0, 2), RollCall(store, 1, 2)
    boom = KeyError("boom")
    assert explain(boom, other) is boom
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    failure = explain(lost, one)
    assert isinstance(failure, RunError)
    assert str(failure).startswith("rank 1 failed: 'boom'; the same command goes on from the last")
    assert explain(failure, one) is failure  # and so at each level that it passes


def test_a_rank_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "PATIENCE_SECONDS", 0.2)
    store = HashStore()
    two = RollCall(store, 2, 4)
    explain(dist.DistBackendError("nccl"), RollCall(store, 0, 4))  # lost one as well
    failure = explain(dist.DistBackendError("nccl"), two)
    assert str(failure).startswith("ranks 1, 3 ended without a word, or stopped answering: killed")


def test_where_all_ranks_are_there_the_network_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "PATIENCE_SECONDS", 0.2)
    store = HashStore()
    explain(dist.DistBackendError("nccl"), RollCall(store, 0, 2))
    failure = explain(dist.DistBackendError("nccl"), RollCall(store, 1, 2))
    assert "the connection between the ranks was lost: look at the network" in str(failure)
