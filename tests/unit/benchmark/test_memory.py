"""Peaks of encoding, decoding and a step of every way."""

import logging
from functools import partial
from typing import Any

import pytest
import torch

from kl_vae.benchmark import memory
from kl_vae.benchmark.inference import ways
from kl_vae.benchmark.memory import CHECKPOINTED, Memory, figures, measure_memory, table
from kl_vae.benchmark.peak import Cost
from kl_vae.benchmark.plain_step import STEP_WAYS
from kl_vae.benchmark.timing import Timing
from kl_vae.ddconfig import DDConfig
from kl_vae.runtime.errors import RunError

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def ddconfig(tiny_ddconfig: dict[str, Any]) -> DDConfig:
    return DDConfig.from_dict(tiny_ddconfig)


def in_this_process(monkeypatch: pytest.MonkeyPatch, without: str = "") -> list[str]:
    """Let the calls run here, where memory is not known; tell which were made."""
    called = []

    def cost_of(call: partial[Any], device: torch.device, threads: int) -> Cost:
        name = next(arg for arg in call.args if arg in names())
        called.append(name)
        if name == without:
            raise RunError("a measurement ended without a word")
        call()()
        return Cost(float(len(called)), before=GB, peak=(2 + len(called)) * GB)

    monkeypatch.setattr(memory, "cost_of", cost_of)
    return called


def names() -> list[str]:
    return ["diffusers", "diffusers, channels_last", CHECKPOINTED, *ways(CPU), *STEP_WAYS]


def test_every_way_is_called_by_turns(ddconfig: DDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    called = in_this_process(monkeypatch)
    decode = list(measure_memory(ddconfig, 4, CPU, "decode", size=16, repeats=2))
    coding = ["diffusers", "diffusers, channels_last", *ways(CPU)]
    assert [m.way for m in decode] == coding
    assert called == [*coding, *coding[1:], coding[0]]
    first = decode[0]
    assert first.timing == Timing.of([1.0, 2.0 * len(coding)])
    assert (first.peak, first.added) == ((2 + 2 * len(coding)) * GB, (1 + 2 * len(coding)) * GB)
    step = list(measure_memory(ddconfig, 4, CPU, "step", size=16))
    assert [m.way for m in step] == ["diffusers", CHECKPOINTED, *STEP_WAYS]


def test_what_the_memory_does_not_suffice_for_is_left_out(
    ddconfig: DDConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without, *others = ways(CPU)
    in_this_process(monkeypatch, without)
    with caplog.at_level(logging.WARNING):
        found = list(measure_memory(ddconfig, 3, CPU, "encode", size=16, repeats=2))
    assert [m.way for m in found] == others
    text = f"encode 16 x 16, {without}: left out: a measurement ended without a word"
    assert caplog.messages == [text]


def test_checkpointing_of_diffusers_is_on(
    ddconfig: DDConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    seen = []
    monkeypatch.setattr(
        memory, "their_forward", lambda twin: seen.append(twin) or _nothing_of(twin)
    )
    for way in ("diffusers", CHECKPOINTED):
        memory._prepare_step(way, ddconfig, 4, 16, 1, "cpu", "fp32")
    assert [twin.is_gradient_checkpointing for twin in seen] == [False, True]
    assert all(twin.training for twin in seen)


def _nothing_of(twin: Any) -> Any:
    weight = next(twin.parameters())
    return lambda images, noise: (images + weight.sum(), weight.sum()[None])


MEASURED = Memory("decode", "diffusers", 1, 1024, Timing(4.0, 4.0, 4.0), 8 * GB, 6 * GB)


def test_the_table_has_parts_of_the_first_way() -> None:
    ours = Memory("decode", "ours", 1, 1024, Timing(3.0, 3.0, 3.0), 4 * GB, 2 * GB)
    step = Memory("step", "ours", 1, 256, Timing(1.0, 1.0, 1.0), 2 * GB, GB)
    lines = table([MEASURED, ours, step]).splitlines()
    row = "| decode | 1 x 1024 x 1024 | ours | 4.00 | 0.50 | 2.00 | 0.33 | 3 | 0.75 |"
    assert lines[3] == row
    assert lines[4] == "| step | 1 x 256 x 256 | ours | 2.00 | 1.00 | 1.00 | 1.00 | 1 | 1.00 |"
    assert figures([ours])[0].items() >= {"way": "ours", "peak": 4 * GB, "added": 2 * GB}.items()
