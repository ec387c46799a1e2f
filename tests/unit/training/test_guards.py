"""Guards of a run: bad images and signals (the tests of step.py check skipped steps)."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from kl_vae.data import STOP_SIGNALS, BadImage
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError
from kl_vae.training.guards import BadImages, stop_on_signals
from tests.messages import is_about, mentions

RANKS = Ranks(0, 1, torch.device("cpu"))


def test_each_bad_image_is_listed_once_even_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = BadImage("a.png", "truncated"), BadImage("b: c.png", "not an image: no")
    bad_images = BadImages(tmp_path, RANKS, number=300, max_fraction=0.01)
    bad_images.note([a, a])
    bad_images.note([a])
    again = BadImages(tmp_path, RANKS, number=300, max_fraction=0.01)
    again.note([b, a])
    listed = (tmp_path / "bad_images.txt").read_text()
    assert listed == "a.png\ttruncated\nb: c.png\tnot an image: no\n"
    first, second = caplog.messages
    assert is_about(first, "a.png", "truncated")
    assert is_about(second, "b: c.png", "not an image: no")


def test_more_bad_images_than_allowed_are_too_many(tmp_path: Path) -> None:
    bad_images = BadImages(tmp_path, RANKS, number=200, max_fraction=0.01)
    assert not bad_images.too_many
    bad_images.note([BadImage("a", "x"), BadImage("b", "x")])
    assert not bad_images.too_many  # 1 % is allowed
    bad_images.note([BadImage("c", "x")])
    assert bad_images.too_many
    assert BadImages(tmp_path, RANKS, number=200, max_fraction=0.01).too_many
    error = mentions(3, 200, "data.max_bad_fraction=0.01", "bad_images.txt", "--run-dir")
    with pytest.raises(RunError, match=error):
        bad_images.check()


def test_a_list_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad_images = BadImages(tmp_path / "gone", RANKS, number=200, max_fraction=0.01)
    bad_images.note([BadImage("a.png", "truncated")])
    assert is_about(caplog.text, "gone/bad_images.txt", "No such file or directory")


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_the_first_signal_is_noted_and_the_handlers_are_restored(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.signal == name
        assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(number) == before
    (message,) = caplog.messages
    assert is_about(message, name)


def test_under_nohup_a_lost_terminal_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_handlers_are_not_set_in_another_thread() -> None:
    """Python refuses to set handlers there; a notebook may train in one."""
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.extend([stop.requested, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, before]
