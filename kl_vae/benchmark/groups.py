"""Processes that do the same together when they are asked to, and wait else."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError

Actions = dict[str, Callable[[], float]]


class Group:
    """Ranks on the CPU, connected by gloo where there are several; as a context they end with it.

    Args:
        ranks: how many.
        threads: of each.
        prepare: in each process, gives what it can be asked for by name; can be pickled.
        store: a file that does not exist, by which they meet.
    """

    def __init__(
        self, ranks: int, threads: int, prepare: Callable[[Ranks], Actions], store: Path
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, ranks, threads, prepare, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def do(self, what: str) -> list[float]:
        """Let all ranks do it, and wait for each; what they answer.

        Raises:
            RunError: one of them has failed or ended.
        """
        answers = []
        try:
            for connection in self._connections:
                connection.send(what)
            for rank, connection in enumerate(self._connections):
                answer: float | str = connection.recv()
                if isinstance(answer, str):
                    raise RunError(f"rank {rank} of a measurement failed: {answer}")
                answers.append(answer)
        except (EOFError, ConnectionError):
            raise RunError(
                "a rank of a measurement ended without a word: mostly memory ran out; give smaller "
                "or fewer images"
            ) from None
        return answers

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            if kind is not None:
                process.terminate()  # it may wait for another that has failed
            connection.close()  # which ends it
        for process in self._processes:
            process.join()


def _serve(
    rank: int,
    ranks: int,
    threads: int,
    prepare: Callable[[Ranks], Actions],
    store: str,
    connection: Connection,
) -> None:
    """In a process of the group: do what is asked for until the connection is closed."""
    torch.set_num_threads(threads)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    actions: Actions = {}
    try:
        actions = prepare(Ranks(rank, ranks, torch.device("cpu")))
        while True:
            connection.send(actions[connection.recv()]())
    except EOFError:
        pass  # the parent has closed it
    except Exception as error:  # the parent says it in one line
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
    if ranks > 1:
        actions.clear()
        gc.collect()  # DDP lies in reference cycles, and must be gone before its process group
        dist.destroy_process_group()
