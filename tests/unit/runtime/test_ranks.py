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


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            ("SLURM_NTASKS=2", "torchrun --nproc-per-node 2 -m kl_vae train 'a b.yaml'"),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "4"},
            ("srun --ntasks-per-node=1 torchrun --nnodes 4", "-m kl_vae train 'a b.yaml'"),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"},
            ("OMPI_COMM_WORLD_SIZE=3", "mpirun", "torchrun --nproc-per-node 3"),
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ("PMI_SIZE=2", "torchrun --nproc-per-node 2")),
    ],
)
def test_several_processes_without_torchrun_are_an_error(
    environment: dict[str, str], parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["kl-vae", "train", "a b.yaml"])
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=mentions(*parts)), connect("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with connect("cpu") as ranks:
        assert ranks.world_size == 1


@pytest.mark.parametrize("environment", [{"SLURM_NTASKS": "4"}, {"SLURM_PROCID": "0"}])
def test_an_allocation_without_srun_is_one_process(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with connect("cpu") as ranks:
        assert ranks.world_size == 1


def test_a_single_process_needs_no_communication() -> None:
    with connect("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_rank_zero) == (0, 1, True)
        assert ranks.any_of(True, False) == [True, False]
        assert ranks.gather("a") == ["a"]
        assert ranks.on_rank_zero(lambda: 5) == 5
