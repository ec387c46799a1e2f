"""Start runs of `kl-vae train` that are killed: in an operation of a save, or from outside.

torch is imported once, by multiprocessing's fork server; each rank is a process forked from it.
"""

from __future__ import annotations

import builtins
import gc
import itertools
import json
import multiprocessing
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import PIL

PRELOADED = [
    *("torch.distributed", "torch.utils.tensorboard", "kl_vae.training.loop"),
    "torch._dynamo",  # which torch imports at the first optimiser
    # all of which PIL imports at the first image
    *(f"PIL.{name}" for _, name, _ in iter_modules(PIL.__path__) if name.endswith("Plugin")),
]
PATIENCE_SECONDS = 120.0  # a run takes one, but on a busy machine many

# a module for --import: its loss notes the images of each step, in a file of its process
RECORDED = """
import hashlib, os
from kl_vae import register_loss
from kl_vae.losses.adversarial import LPIPSWithDiscriminator

@register_loss("recorded")
class Recorded(LPIPSWithDiscriminator):
    def forward(self, inputs, reconstructions, posterior, global_step, *others, split, **more):
        if split == "train":
            with open(f"samples/{os.getpid()}", "a") as file:
                for image in inputs:
                    content = image.contiguous().numpy().tobytes()
                    file.write(f"{global_step} {hashlib.sha256(content).hexdigest()}\\n")
        four = (inputs, reconstructions, posterior, global_step)
        return super().forward(*four, *others, split=split, **more)
"""

_ports = itertools.count(20_000 + os.getpid() % 10_000)  # below those that systems hand out
_lock = threading.Lock()  # `Process` is not made for several threads


class Attempt:
    """One start of a run: its ranks, and what they leave in logs/, samples/ and saves/.

    Args:
        folder: the working directory, with these three folders.
        arguments: of `kl-vae train`.
        ranks: how many processes.
        kill: a save, and the operation of it before which rank 0 ends itself: its place, or what
            it is. Both numbers count from 0.
    """

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        ranks: int = 1,
        kill: tuple[int, int | str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = folder
        self._began = time.monotonic()
        self._processes: list[Any] = []
        self._alive: list[Connection] = []
        self.seconds = [0.0] * ranks  # until each of them ended
        port = _free_port()
        for rank in range(ranks):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            group = {key: str(value) for key, value in group.items()}
            environment = {**group, "MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}
            # data workers inherit it: it is open until the last of them has ended
            alive, end = context.Pipe(duplex=False)
            process = context.Process(
                target=_train, args=(folder, arguments, environment, kill, end)
            )
            with _lock:
                process.start()
            end.close()
            self._processes.append(process)
            self._alive.append(alive)

    def wait(self) -> Attempt:
        """Wait until all ranks have ended."""
        running = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        while running:
            ended = wait_for_any(list(running), self._began + PATIENCE_SECONDS - time.monotonic())
            if not ended:
                for rank in running.values():
                    self.kill(rank)
                raise TimeoutError(f"ranks {list(running.values())} do not end:\n{self.log(0)}")
            for sentinel in ended:
                self.seconds[running.pop(sentinel)] = time.monotonic() - self._began
        with _lock:
            for process in self._processes:
                process.join()
        return self

    def kill(self, rank: int) -> None:
        """Kill a rank that is still there."""
        self._processes[rank].kill()

    def kill_after(self, rank: int, seconds: float) -> None:
        """Kill a rank, unless it ends before."""
        wait_for_any([self._processes[rank].sentinel], seconds)
        self.kill(rank)

    def wait_for_data_workers(self) -> None:
        """Wait until the data workers have ended as well, which nobody tells to."""
        for alive in self._alive:
            assert alive.poll(PATIENCE_SECONDS), "a data worker does not end"
            alive.close()

    @property
    def codes(self) -> list[int]:
        """The exit code of each rank, negative where a signal ended it."""
        return [process.exitcode for process in self._processes]

    def wait_for_first_step(self) -> None:
        """Wait until rank 0 is in its first step, or has ended without one."""
        sentinel = self._processes[0].sentinel
        while not self._text("samples", 0) and not wait_for_any([sentinel], 0.005):
            pass

    def log(self, rank: int) -> str:
        """What a rank has said."""
        return self._text("logs", rank)

    @property
    def saves(self) -> list[list[str]]:
        """The operations of each save, in their order."""
        return [json.loads(line) for line in self._text("saves", 0).splitlines()]

    @property
    def samples(self) -> dict[int, Counter[str]]:
        """Of each step that was begun the images that it took, on all ranks."""
        steps: dict[int, Counter[str]] = {}
        for rank in range(len(self._processes)):
            for line in self._text("samples", rank).splitlines():
                step, image = line.split()
                steps.setdefault(int(step), Counter())[image] += 1
        return steps

    def _text(self, kind: str, rank: int) -> str:
        path = self._folder / kind / str(self._processes[rank].pid)
        return path.read_text() if path.exists() else ""


def stages(operations: list[str]) -> list[int]:
    """Which operations of a save to kill it in: all, but of the blocks of a file only three."""
    chosen = []
    for is_write, group in itertools.groupby(enumerate(operations), lambda x: x[1] == "write"):
        places = [i for i, _ in group]
        if is_write:
            places = sorted({places[0], places[len(places) // 2], places[-1]})
        chosen += places
    return chosen


def _free_port() -> int:
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError


def _train(
    folder: Path,
    arguments: list[str],
    environment: dict[str, str],
    kill: tuple[int, int | str] | None,
    alive: Connection,
) -> None:
    """What a rank does."""
    import torch

    from kl_vae.cli.main import main

    gc.freeze()  # what is imported need not be looked through, again and again
    multiprocessing.set_start_method(None, force=True)  # data workers start as they always do
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open(f"logs/{os.getpid()}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if environment.get("RANK", "0") == "0":
        _Saves(kill).watch()
    sys.exit(main(["train", *arguments]))


class _Saves:
    """Lists the operations of each save on the file system, and ends this process before one.

    After a validation the writing of best.json counts as a save, too.

    Where that is the writing of a block, half of it is written.
    """

    def __init__(self, kill: tuple[int, int | str] | None) -> None:
        self._kill = kill
        self._number = 0  # of the save
        self._operations: list[str] | None = None  # of the save that is going on

    def watch(self) -> None:
        """From now on."""
        from kl_vae.training.run_directory import RunDirectory

        save, write_best = RunDirectory.save, RunDirectory.write_best
        fsync, plain_open = os.fsync, open

        def watched(work: Any) -> Any:
            def watched_work(*arguments: Any, **options: Any) -> None:
                if len(arguments) < 3:  # `write_best` at the start, which follows no validation
                    work(*arguments)
                    return
                self._operations = []
                work(*arguments, **options)
                self.meet("end")
                with plain_open(f"saves/{os.getpid()}", "a") as file:
                    file.write(json.dumps(self._operations) + "\n")
                self._operations = None
                self._number += 1

            return watched_work

        def watched_fsync(descriptor: int) -> None:
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            self.meet("fsync folder" if is_folder else "fsync")
            fsync(descriptor)

        def watched_open(path: Any, mode: str = "r", *others: Any, **options: Any) -> Any:
            writes = self._operations is not None and mode in ("wb", "xb")
            if writes:
                self.meet("open")
            file = plain_open(path, mode, *others, **options)
            return _File(file, self) if writes else file

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            operation = {"os.mkdir": "mkdir", "os.remove": "remove", "os.rename": "rename to"}
            if event in operation and self._operations is not None:
                path = Path(os.fsdecode(arguments[event == "os.rename"]))
                if "checkpoints" in path.parts:  # and not the cache of an import
                    self.meet(f"{operation[event]} {path.name}")

        RunDirectory.save = watched(save)  # type: ignore[method-assign]
        RunDirectory.write_best = watched(write_best)  # type: ignore[method-assign]
        os.fsync = watched_fsync
        builtins.open = watched_open
        sys.addaudithook(audit)

    def meet(self, operation: str, file: Any = None, block: bytes = b"") -> None:
        """Note an operation that is about to happen, or end the process in its place."""
        if self._operations is None:
            return
        if self._kill in [(self._number, x) for x in (operation, len(self._operations))]:
            if file is not None:
                file.write(block[: len(block) // 2])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self._operations.append(operation)


class _File:
    """A file whose blocks are noted before they are written."""

    def __init__(self, file: Any, saves: _Saves) -> None:
        self._file = file
        self._saves = saves

    def write(self, block: bytes) -> int:
        self._saves.meet("write", self._file, block)
        return self._file.write(block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
