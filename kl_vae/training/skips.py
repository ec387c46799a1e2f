"""Steps that are left out for want of finite numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kl_vae.distributed.ranks import Ranks
from kl_vae.errors import RunError

logger = logging.getLogger(__name__)


@dataclass
class Skips:
    """How many steps were left out, on all ranks alike.

    Attributes:
        total: those whose loss or gradient was not finite.
        in_a_row: the last of these.
        by_scaler: those (fp16) whose gradient overflowed since the scale was too large; it is
            halved then, which is how a scaler finds it. Each network's count.
    """

    total: int = 0
    in_a_row: int = 0
    by_scaler: int = 0

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return asdict(self)

    def load_state_dict(self, content: dict[str, int]) -> None:
        """Take up what `state_dict` gave."""
        self.total, self.in_a_row, self.by_scaler = (
            content[key] for key in ("total", "in_a_row", "by_scaler")
        )

    def note_taken(self) -> None:
        """A step was finite."""
        self.in_a_row = 0

    def note(
        self,
        ranks: Ranks,
        step: int,
        losses: Sequence[float],
        names: Sequence[Sequence[str]],
        bound: int,
    ) -> None:
        """Count a step and log its files; all ranks call this.

        Args:
            ranks: that step together.
            step: that is left out, counted from 1.
            losses: of this rank's micro-batches.
            names: of their files.
            bound: how many in a row end the run.

        Raises:
            RunError: that many in a row.
        """
        self.total += 1
        self.in_a_row += 1
        broken = [not abs(loss) < float("inf") for loss in losses]
        # where every loss is finite its gradient was not, and any image may be the cause
        mine = [names[i] for i in range(len(losses)) if broken[i] or not any(broken)]
        told = ranks.gather((any(broken), [name for batch in mine for name in batch]))
        guilty = [rank for rank, (has_broken, _) in enumerate(told) if has_broken]
        what = f"the loss on rank {', '.join(map(str, guilty))}" if guilty else "the gradient"
        if ranks.is_first:
            logger.warning(
                "step %d is left out: %s is not finite (%d so far, %d in a row); its images:",
                *(step, what, self.total, self.in_a_row),
            )
            for rank in guilty or range(len(told)):
                logger.warning("  rank %d: %s", rank, ", ".join(told[rank][1]))
        if self.in_a_row >= bound:
            raise RunError(
                f"{bound} steps in a row had no finite loss or gradient: lower the learning rates, "
                "set training.precision to bf16 or fp32, or look at the images that are named "
                "above; training.max_skipped_steps is the bound"
            )
