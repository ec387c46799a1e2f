"""Taking turns, and counting passes."""

import pytest
import torch
from torch import nn

from kl_vae.benchmark.timing import Passes, Timing, alternate, counting

CPU = torch.device("cpu")


def test_candidates_take_turns_after_a_warm_up_and_none_always_comes_first() -> None:
    order: list[str] = []
    candidates = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = alternate(candidates, 4, CPU)
    assert " ".join(map("".join, zip(*[iter(order)] * 3, strict=True))) == "abc abc bca cab abc"
    assert timings.keys() == {"a", "b", "c"}


def test_the_warm_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    durations = iter([100.0, 3.0, 1.0, 8.0])

    def call() -> None:
        now[0] += next(durations)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert alternate({"a": call}, 3, CPU) == {"a": Timing(median=3.0, low=1.0, high=8.0)}


def test_a_timing_in_markdown() -> None:
    assert Timing.of([0.25, 0.5, 0.123456]).cells == "0.25 | 0.1235 to 0.5"


def test_passes_are_counted_within_the_block_alone() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(4, 1)
    x = torch.ones(2, 3)
    with counting({"first": first, "second": second}) as passes:
        total = second(first(x)).sum()
        torch.autograd.grad(total, second.weight, retain_graph=True)  # stops at the second
        total.backward()
        with torch.no_grad():
            first(x)
    first(x)
    assert passes == {"first": Passes(2, 1), "second": Passes(1, 2)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_duration_ends_when_the_work_has_ended() -> None:
    x = torch.randn(4096, 4096, device="cuda")

    def multiply() -> None:
        for _ in range(20):
            x @ x

    def multiply_and_wait() -> None:
        multiply()
        torch.cuda.synchronize()

    candidates = {"plain": multiply, "waiting": multiply_and_wait}
    timings = alternate(candidates, 5, torch.device("cuda"))
    assert timings["plain"].median > 0.5 * timings["waiting"].median
