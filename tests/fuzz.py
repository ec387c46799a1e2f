"""Fuzz everything that is read: images, tar shards, configs, checkpoints, metrics and latents.

    python -m tests.fuzz --seconds 3600 --seed 1
    python -m tests.fuzz --kind images --seed 1 --number 123    # one case, with its traceback

Valid files are damaged at random (see `tests.mutations`) and given to the function that reads them.
A case is a function of kind, seed and number. It passes if the file is read, or refused by an error
of one printable line that names it. It fails with any other exception, a signal, more than 10 s of
CPU time, 30 s after which it waits, or 2 GiB of memory. Cases run in a forked worker; Linux only.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch

from kl_vae.runtime.errors import RunError
from kl_vae.runtime.files import display_name
from tests import fuzz_targets
from tests.mutations import damaged

CPU_SECONDS, WALL_SECONDS, MEMORY = 10.0, 30.0, 2 << 30
CASE = "case"  # folder of a case, in the working directory
_TICKS = os.sysconf("SC_CLK_TCK")


class Fuzzer:
    """The cases of a kind.

    Args:
        kind: name of a kind in `fuzz_targets.KINDS`.
        seed: of the damage.
        folder: for the valid files and the cases.
    """

    def __init__(self, kind: str, seed: int, folder: Path) -> None:
        self.kind = kind
        self.seed = seed
        self.folder = folder.resolve()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with fuzz_targets.working_in(self.folder):
            self.examples = fuzz_targets.KINDS[kind](Path("valid"))
        for example in self.examples:
            self._write(example.files, self.folder / CASE)
            with fuzz_targets.working_in(self.folder / CASE):
                assert example.read(example.damage[0], Random(0)) is None
        self.contents = [content for example in self.examples for content in example.files.values()]

    def write(self, number: int, folder: Path) -> tuple[fuzz_targets.Example, str, Random]:
        """Write the files of a case; return its example and the name of the damaged file."""
        draw = Random(f"{self.kind} {self.seed} {number}")
        example = draw.choice(self.examples)
        name = draw.choice(example.damage)
        content = damaged(name, example.files[name], draw.choice(self.contents), draw)
        self._write({**example.files, name: content}, folder)
        return example, name, draw

    @staticmethod
    def _write(files: Mapping[str, bytes], folder: Path) -> None:
        """Write files into a new folder."""
        shutil.rmtree(folder, ignore_errors=True)
        for path, data in files.items():
            fuzz_targets.write_file(folder / path, data)

    def run(self, number: int) -> str:
        """Run a case; return `read`, `skipped` or `refused`. What else is raised is a failure."""
        folder = self.folder / CASE
        example, name, draw = self.write(number, folder)
        with fuzz_targets.working_in(folder):
            try:
                with logged() as messages:
                    outcome = example.read(name, draw) or "read"
                check_printable(messages)
                return outcome
            except (ValueError, RunError) as error:
                check_message(error, (*example.names, display_name(name)))
                return "refused"


@contextmanager
def logged() -> Iterator[list[str]]:
    """Context manager that yields a list, to which messages of the package's log are added."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("kl_vae")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def check_printable(texts: Sequence[str]) -> None:
    """Check that texts have some printable lines."""
    for text in texts:
        lines = text.split("\n")
        assert text and all(line.isprintable() and len(line) < 5000 for line in lines), text[:5000]


def check_message(error: ValueError | RunError, names: Sequence[str]) -> None:
    """Check that a message is one that a user can read: printable lines that name the file."""
    text = str(error)
    check_printable([text])
    assert any(name in text for name in names), f"names none of {names}: {type(error)} {text}"


# --- the worker, and who watches it


def work(fuzzer: Fuzzer, start: int, pipe: Connection) -> None:
    """Run cases from `start` on; send each number before its case and its outcome after it."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)  # decoders in C write warnings
    for number in range(start, sys.maxsize):
        pipe.send((number, ""))
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory_of(os.getpid())
        outcome = outcome_of(fuzzer, number)
        grown = memory_of(os.getpid(), "VmHWM") - before
        pipe.send((number, outcome if grown < MEMORY else f"FAILED memory: {grown >> 20} MiB"))


def outcome_of(fuzzer: Fuzzer, number: int) -> str:
    """Run a case; return its outcome, or `FAILED ...`."""
    try:
        return fuzzer.run(number)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/kl_vae/" in frame.filename] or frames
        place = f"{own[-1].filename.rpartition('/kl_vae/')[2]}:{own[-1].lineno}"
        text = " ".join(ascii(str(error)).split())
        return f"FAILED {type(error).__name__} at {place}: {text:.300}"


def memory_of(pid: int, key: str = "VmRSS") -> int:
    """Return the bytes of memory that a process uses."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), 0)


def cpu_seconds_of(pid: int) -> float:
    """Return the CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def state_of(pid: int) -> str:
    """Return the state of a process: R if it runs or could, S if it waits."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def outcomes(fuzzer: Fuzzer, until: float) -> Iterator[tuple[int, str]]:
    """Yield the number and the outcome of each case; a worker that fails is replaced."""
    start = 0
    while time.monotonic() < until:
        for number, outcome in _of_worker(fuzzer, start, until):
            yield number, outcome
            start = number + 1


def _of_worker(fuzzer: Fuzzer, start: int, until: float) -> Iterator[tuple[int, str]]:
    """Yield the outcomes of one worker, which begins with case `start`."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(fuzzer, start, sender), daemon=True)
    worker.start()
    sender.close()
    pid, number, outcome = worker.pid or 0, start, ""
    began, cpu, memory = time.monotonic(), 0.0, memory_of(pid)
    try:
        while time.monotonic() < until:
            if receiver.poll(0.1):
                number, outcome = receiver.recv()
                if outcome:
                    yield number, outcome
                else:
                    began, cpu, memory = time.monotonic(), cpu_seconds_of(pid), memory_of(pid)
                continue
            used, waited = cpu_seconds_of(pid) - cpu, time.monotonic() - began
            waits = waited > WALL_SECONDS and state_of(pid) == "S"  # not for a busy machine
            if used > CPU_SECONDS or waits:
                yield number, f"FAILED time: {used:.0f} s of CPU time, {waited:.0f} s in all"
                return
            if memory_of(pid) - memory > MEMORY:
                yield number, f"FAILED memory: more than {MEMORY >> 20} MiB"
                return
    except EOFError:
        worker.join()
        yield number, f"FAILED exit code {worker.exitcode}"
    finally:
        worker.kill()
        worker.join()


def fuzz(fuzzer: Fuzzer, seconds: float, keep: Path | None) -> Counter[str]:
    """Run cases for some time; print the first failure of each sort, and return all counts."""
    counts: Counter[str] = Counter()
    for number, outcome in outcomes(fuzzer, time.monotonic() + seconds):
        sort = outcome.partition(": ")[0]
        counts[sort] += 1
        if not sort.startswith("FAILED") or counts[sort] > 1:
            continue
        print(f"{fuzzer.kind} --seed {fuzzer.seed} --number {number}: {outcome}", flush=True)
        if keep is not None:
            fuzzer.write(number, keep / f"{fuzzer.kind}-{fuzzer.seed}-{number}")
    return counts


def main() -> int:
    """Run the command; return 1 if there was a failure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=fuzz_targets.KINDS, help="default: all, one by one")
    parser.add_argument("--number", type=int, help="run this case of the kind in this process")
    parser.add_argument("--keep", type=Path, help="folder for the files of failures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [args.kind] if args.kind else list(fuzz_targets.KINDS)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            fuzzer = Fuzzer(kind, args.seed, Path(folder, kind))
            if args.number is not None:
                print(fuzzer.run(args.number))
                continue
            counts = fuzz(fuzzer, args.seconds / len(kinds), args.keep)
            failures += sum(n for sort, n in counts.items() if sort.startswith("FAILED"))
            print(f"{kind}: {sum(counts.values())} cases: {dict(counts)}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
