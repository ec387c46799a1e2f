"""Files that are written while the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Threads that do work whose result nobody waits for; compression of pictures lets others run.

    Args:
        threads: how many; 0: the work is done at once, by the caller.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._most = 2 * threads
        self._pending: deque[Future[None]] = deque()

    def do(self, work: Callable[[], None]) -> None:
        """Have `work` done; waits where the threads are far behind.

        Raises:
            Exception: what earlier work raised.
        """
        if self._pool is None:
            work()
            return
        while len(self._pending) >= self._most:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(work))

    def finish(self) -> None:
        """Wait until all is done.

        Raises:
            Exception: what some work raised, the first of them.
        """
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> Background:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the threads; what has not been begun is left where there is an error."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=kind is not None)
