"""Commands that tests start as a user does, and what their runs leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
TRAIN = (sys.executable, "-m", "kl_vae", "train", "tiny.yaml")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
SCRIPT = str(HERE.parent / "scripts" / "train.py")


class Running:
    """A command that runs beside the test; as a context it is killed at the end, if need be."""

    def __init__(self, *command: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,  # as a terminal or torchrun does, which signal all of it
        )
        self.pid = self._process.pid
        self._said = b""
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)

    @property
    def errors(self) -> str:
        """What it has said on stderr so far."""
        assert self._process.stderr is not None
        with suppress(BlockingIOError):  # nothing new
            while said := os.read(self._process.stderr.fileno(), 1 << 16):
                self._said += said
        return self._said.decode(errors="replace")

    def wait_until(self, condition: Callable[[], object], seconds: float = 120.0) -> None:
        """Wait for something that happens while it runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            errors = self.errors  # read now and then, lest the pipe fill up
            assert self._process.poll() is None, errors + self.errors
            assert time.monotonic() < deadline, errors
            time.sleep(0.02)

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        """Wait until it has said something on stderr."""
        self.wait_until(lambda: text in self.errors, seconds)

    def wait_at_gate(self) -> Path:
        """Wait until `wait` of the faulty loss holds it; it goes on when this file is removed."""
        gate = gate_of(self.pid)
        self.wait_until(gate.exists)
        return gate

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, number)

    def send_all(self, number: signal.Signals) -> None:
        """Send a signal to this process and what it has started."""
        os.killpg(self.pid, number)

    def end(self, seconds: float = 120.0) -> int:
        """Wait until it ends by itself; return its exit code."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"still there after {seconds} s: {self.errors}"
            time.sleep(0.02)
        return self._process.returncode

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            for pid in (*descendants(self.pid), self.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()  # to read to its end could be to wait for an orphan's


def run_to_its_end(*command: str, **environment: str) -> tuple[int, str]:
    """Start a command and wait for it; return its exit code and what it said on stderr."""
    with Running(*command, **environment) as running:
        return running.end(), running.errors


def ranks_by_hand(*arguments: str, number: int = 2, **environment: str) -> list[Running]:
    """Start the ranks of a run without torchrun, as a cluster's own launcher does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    return [
        Running(*TRAIN, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **group, **environment)
        for rank in range(number)
    ]


def children(pid: int) -> list[int]:
    """The processes that a process has started and that have not ended."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it ends, or a thread of it
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if is_alive(child)]


def descendants(pid: int) -> list[int]:
    """The children of a process, theirs, and so on; the youngest first."""
    return [p for child in children(pid) for p in (*descendants(child), child)]


def is_alive(pid: int) -> bool:
    """Whether a process is there and is more than an exit code that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gate_of(pid: int) -> Path:
    """The file whose removal lets a process go on that waits in the faulty loss."""
    return Path(f"gate_{pid}")


def pid_of_rank(torchrun: Running, rank: int) -> int:
    """The process that torchrun has started for a rank."""
    wanted = f"RANK={rank}".encode()
    (found,) = (
        pid
        for pid in children(torchrun.pid)
        if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    return found


def faulty_loss(project: Path) -> list[str]:
    """The arguments that make a run in `project` use the loss of `faulty_loss.py`."""
    target = project / "faulty_loss.py"
    if not target.exists():  # a run may be reading it
        shutil.copy(HERE / "faulty_loss.py", target)
    loss = "model.params.lossconfig.target=faulty_loss.FaultyELBO"
    return ["--allow-import", "faulty_loss", loss]


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none where it is not there yet."""
    path = Path(run, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def without_speed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the lines is the same whenever the same is computed."""
    return [{k: x for k, x in line.items() if k != "images_per_second"} for line in lines]


def status(run: str | Path) -> dict[str, Any]:
    """What status.json says."""
    content: dict[str, Any] = json.loads(Path(run, "status.json").read_text())
    return content


def saved_steps(run: str) -> list[int]:
    """The steps of the checkpoints; nothing but them and their sha256 is beside them."""
    names = {path.name for path in Path(run, "checkpoints").iterdir()} - {"best.json"}
    steps = sorted(int(name[5:13]) for name in names if name.endswith(".pt"))
    assert names == {f"step_{step:08d}.pt{end}" for step in steps for end in ("", ".sha256")}
    return steps


def checkpoint(run: str | Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds, but for what may differ between runs that learn the same."""
    path = Path(run, "checkpoints", f"step_{step:08d}.pt")
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return {key: content[key] for key in content.keys() - {"config"}}


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other
