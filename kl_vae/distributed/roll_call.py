"""Which rank ended before the others, and why."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread

from torch.distributed.distributed_c10d import Store

# for the others to say that they are there; they fail at about the same time
PATIENCE_SECONDS = 5.0

_LOST_ANOTHER = "lost another rank"


@dataclass
class RollCall:
    """A rank that ends with an error leaves its reason in the store, where the others find it."""

    store: Store
    rank: int
    world_size: int
    _left: bool = False
    _store_hangs: bool = False

    def leave(self, reason: str) -> None:
        """Say why this rank ends; what it says first counts."""
        if self._left:
            return
        self._left = True
        try:
            self.store.set(f"ended/{self.rank}", reason)
        except RuntimeError:  # the store went with the rank that holds it
            pass

    def lost(self) -> str:
        """Say which ranks ended, after a collective operation of this one has failed.

        Ranks that neither left a reason nor answer within `PATIENCE_SECONDS` are gone.
        """
        self.leave(_LOST_ANOTHER)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline = time.monotonic() + PATIENCE_SECONDS
        silent: list[str] = []
        for rank in others:
            reason = self._reason(rank, max(0.1, deadline - time.monotonic()))
            if reason is None:
                silent.append(str(rank))
                if self._store_hangs:
                    break  # of the others nobody can tell
            elif reason != _LOST_ANOTHER:
                return f"rank {rank} failed: {reason}"
        if not silent:
            return "the connection between the ranks was lost: look at the network"
        ranks = f"rank{'s' * (len(silent) > 1)} {', '.join(silent)}"
        return (
            f"{ranks} ended without a word, or stopped answering: killed, out of memory (dmesg), "
            "or a machine is gone"
        )

    def _reason(self, rank: int, seconds: float) -> str | None:
        answers: list[str] = []

        def ask() -> None:
            key = f"ended/{rank}"
            # an error: nothing came, or the store is gone with the rank that holds it
            with suppress(RuntimeError):
                self.store.wait([key], timedelta(seconds=seconds))
                answers.append(self.store.get(key).decode())

        # where the machine of the store hangs a call never comes back, whatever its time-out
        thread = Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds + 1.0)
        self._store_hangs = thread.is_alive()
        return answers[0] if answers else None
