"""What asks a run to end."""

from __future__ import annotations

import os
import signal

import pytest
from kl_vae.training.signals import stop_on_signals

from kl_vae.data import STOP_SIGNALS


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_the_first_signal_is_noted_and_the_handlers_are_put_back(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == name
        assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(number) == before
    assert caplog.messages == [f"{name}: ending at the next step; once more ends at once, unsaved"]


def test_under_nohup_a_lost_terminal_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
