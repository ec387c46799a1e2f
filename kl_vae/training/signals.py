"""Stop at the next step boundary when asked to."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kl_vae.data import STOP_SIGNALS

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether a signal has asked the run to end; `signal` names it."""

    signal: str | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal of a kind; the second of the same kind ends the process at once."""
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        logger.warning("%s: ending at the next step; once more ends at once, unsaved", self.signal)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM, SIGUSR1 and SIGHUP into a StopRequest while the run goes on."""
    request = StopRequest()
    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)  # as nohup wants it
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def no_worker_left() -> Iterator[None]:
    """Kill the data workers where an error ends the run.

    A process that exits sends SIGTERM to its children and waits for them, and these ignore it.
    """
    before = multiprocessing.active_children()
    try:
        yield
    except Exception:
        numbers = [signal.SIGCHLD] if hasattr(signal, "SIGCHLD") else []
        # torch's handler raises one more error for each that is killed
        handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()
                process.join(5.0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        raise
