"""Damaged files of every kind are read, or refused in one line; see `tests.fuzz`."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz import Fuzzer

for package in ("safetensors", "tifffile"):
    pytest.importorskip(package)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the worker needs /proc")

CASES = {"images": 80, "tars": 60, "yaml": 40, "checkpoints": 40, "metrics": 60, "latents": 60}


@pytest.mark.parametrize("kind", CASES)
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    fuzzer = Fuzzer(kind, seed=0, folder=tmp_path / kind)
    outcomes = Counter(fuzzer.run(number) for number in range(CASES[kind]))
    assert outcomes.keys() <= {"read", "skipped", "refused"}
    assert outcomes["read"] > 0
    assert kind == "metrics" or outcomes["skipped"] + outcomes["refused"] > 0


def test_a_case_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    contents = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        fuzzer = Fuzzer("tars", seed, tmp_path / folder)
        fuzzer.run(number=7)
        fuzzer.write(3, tmp_path / folder / "kept")
        contents.append((tmp_path / folder / "kept" / "shards" / "a.tar").read_bytes())
    assert contents[0] == contents[1] != contents[2]


BAD_READERS = """
import os, pathlib, sys
from tests import fuzz, fuzz_targets

def read(name, draw):
    kind = draw.randrange(6)
    if kind == 0:
        raise KeyError("step")
    if kind == 1:
        os.kill(os.getpid(), 11)
    if kind == 2:
        while True:
            pass
    if kind == 3:
        taken = [bytearray(1 << 24) for _ in range(20)]
    if kind == 4:
        raise ValueError("does not say which file")
    if kind == 5:
        raise ValueError(f"{name}: two\\nlines \\x1b[31m")

def valid(folder):
    return [fuzz_targets.Example({"a.yaml": b"a: 1"}, ["a.yaml"], lambda name, draw: None)]

fuzz_targets.KINDS = {"bad": valid}
fuzz.CPU_SECONDS, fuzz.MEMORY = 0.3, 1 << 26
fuzzer = fuzz.Fuzzer("bad", 0, pathlib.Path(sys.argv[1], "bad"))
fuzzer.examples = [fuzz_targets.Example({"a.yaml": b"a: 1"}, ["a.yaml"], read)]
found = set()
for number, outcome in fuzz.outcomes(fuzzer, float("inf")):
    found.add(outcome.split(":")[0].split(" at ")[0])
    if number == 60:
        break
print(sorted(found))
"""


def test_what_is_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BAD_READERS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    sorts = ["AssertionError", "KeyError", "exit code -11", "memory", "time"]
    assert result.stdout == f"{[f'FAILED {sort}' for sort in sorts]}\n"
