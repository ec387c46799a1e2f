"""Work that is done in threads."""

from __future__ import annotations

import threading
import time

import pytest

from kl_vae.inference.reconstruction.background import Background


@pytest.mark.parametrize("threads", [0, 2])
def test_all_is_done_when_it_is_finished(threads: int) -> None:
    done: list[int] = []
    with Background(threads) as background:
        for i in range(20):
            background.do(lambda i=i: done.append(i))
        background.finish()
        assert sorted(done) == list(range(20))


def test_an_error_reaches_the_one_who_waits() -> None:
    def fail() -> None:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"), Background(1) as background:
        background.do(fail)
        background.finish()
    with pytest.raises(ValueError, match="no room"), Background(1) as background:
        for _ in range(4):
            background.do(fail)
    with pytest.raises(ValueError, match="no room"), Background(0) as background:
        background.do(fail)


def test_no_more_waits_than_twice_the_threads() -> None:
    gate = threading.Event()
    with Background(1) as background:
        for _ in range(2):
            background.do(gate.wait)
        threading.Timer(0.1, gate.set).start()
        before = time.monotonic()
        background.do(gate.wait)
        assert time.monotonic() - before > 0.05
        background.finish()


def test_what_was_not_begun_is_left_after_an_error() -> None:
    gate, done = threading.Event(), list[int]()
    with pytest.raises(KeyboardInterrupt), Background(1) as background:
        background.do(gate.wait)
        background.do(lambda: done.append(1))
        threading.Timer(0.1, gate.set).start()
        raise KeyboardInterrupt
    assert done == []
