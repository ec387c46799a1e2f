"""Steps that are left out for want of finite numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kl_vae.data import BadImage
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError
from kl_vae.training.updater import Updater

logger = logging.getLogger(__name__)


BAD_IMAGES = "bad_images.txt"


class BadImages:
    """What bad_images.txt lists, one `path<TAB>reason` a line; every rank knows all of it.

    Args:
        run: the run's directory, whose list is gone on with; None: nothing is written.
        ranks: that read the images.
        number: of images in all, for training and validation.
        max_fraction: of them that may be bad.
    """

    def __init__(self, run: Path | None, ranks: Ranks, number: int, max_fraction: float) -> None:
        self._path = None if run is None else run / BAD_IMAGES
        self._ranks = ranks
        self._number = number
        self._max_fraction = max_fraction
        self._names = set(ranks.on_first(self._read))

    def note(self, found: Sequence[BadImage]) -> None:
        """Take in what this rank found; every rank calls this at the same time."""
        everything = [image for images in self._ranks.gather(list(found)) for image in images]
        new = {image.name: image for image in everything if image.name not in self._names}
        self._names |= new.keys()
        if self._ranks.is_first:
            self._write(list(new.values()))

    @property
    def too_many(self) -> bool:
        """Whether more images are bad than may be."""
        return len(self._names) > self._max_fraction * self._number

    def error(self) -> RunError:
        """What ends a run with too many of them."""
        return RunError(
            f"{len(self._names)} of {self._number} images cannot be used, more than "
            f"data.max_bad_fraction={self._max_fraction} ({self._path} lists them): raise it to go "
            "on without them, or mend them and start in a new --run-dir"
        )

    def _read(self) -> list[str]:
        if self._path is None or not self._path.is_file():
            return []
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.partition("\t")[0] for line in lines if "\t" in line]

    def _write(self, images: Sequence[BadImage]) -> None:
        for image in images:
            logger.warning("an image cannot be used: %s: %s", *image)
        if self._path is None or not images:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(f"{name}\t{reason}\n" for name, reason in images)
        except OSError as error:  # the log has named them
            logger.warning("%s cannot be written (%s)", self._path, error.strerror)


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


class Seen(NamedTuple):
    """What the end of a step must know of a micro-batch."""

    loss: Tensor  # not finite where one of the losses was not
    names: tuple[str, ...]
    bad: tuple[BadImage, ...]


def which_to_take(
    updaters: Sequence[Updater],
    norms: Sequence[Tensor],
    seen: Sequence[Seen],
    ranks: Ranks,
    skips: Skips,
    bad_images: BadImages,
    step: int,
    max_skipped_steps: int,
) -> list[bool]:
    """Whether each network takes its step, the same on all ranks; what is wrong is noted.

    A loss or a gradient that is not finite on any rank leaves the whole step out, on all of them.
    Where it is the gradient of one network in fp16 alone, and its scale may be the cause, that
    network's step is left out and its scale halved.

    Args:
        updaters: of the networks.
        norms: of their gradients.
        seen: this rank's micro-batches.
        ranks: that step together.
        skips: where steps that are left out are counted.
        bad_images: where images that could not be used are noted.
        step: for the log, counted from 1.
        max_skipped_steps: in a row, that end the run.

    Raises:
        RunError: that many in a row, or no image in place of a bad one.
    """
    # one read of the device, and one sum over the ranks, for all that may be wrong
    losses = torch.stack([x.loss.to(norms[0].device) for x in seen])
    fine = torch.stack([losses.isfinite().all(), *(norm.isfinite() for norm in norms)]).cpu()
    bad = [image for x in seen for image in x.bad]
    missing = any(not name for x in seen for name in x.names)
    flags = torch.cat([~fine, torch.tensor([bool(bad), missing])]).int()
    not_finite, *overflows, has_bad, has_missing = ranks.sum(flags).bool().tolist()
    if has_bad:
        bad_images.note(bad)
    if has_missing:
        raise RunError("no image can be read in place of a bad one; look at data.train.root")
    by_scale = [
        overflow and updater.scale_may_be_too_large
        for updater, overflow in zip(updaters, overflows, strict=True)
    ]
    if not_finite or overflows != by_scale:
        skips.note(ranks, step, losses.tolist(), [x.names for x in seen], max_skipped_steps)
        return [False] * len(updaters)
    skips.by_scaler += sum(by_scale)
    skips.note_taken()
    return [not overflow for overflow in overflows]
