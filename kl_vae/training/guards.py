"""What a run is guarded against: numbers that are not finite, bad images, and signals."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from kl_vae.checkpoints.run_files import BAD_IMAGES
from kl_vae.data import STOP_SIGNALS, BadImage
from kl_vae.runtime.device import copy_to_device
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.errors import RunError

logger = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """What `agree_on_step` needs to know about a micro-batch."""

    loss: Tensor  # scalar; not finite if one of the losses is not
    names: tuple[str, ...]  # paths of its images
    bad: tuple[BadImage, ...]  # files that could not be used


class Verdict(NamedTuple):
    """What all ranks do at the end of a step."""

    take: list[bool]  # per network
    stop: bool  # a rank has been asked to stop
    means: Tensor  # of `averaged` over all ranks, on the CPU


@dataclass
class Skips:
    """Counts of skipped steps, equal on all ranks.

    Attributes:
        total: steps with a loss or gradient that was not finite.
        in_a_row: number of consecutive ones up to now.
        by_scaler: fp16 steps skipped by the gradient scaler, which then halves its scale; counted
            per network.
    """

    total: int = 0
    in_a_row: int = 0
    by_scaler: int = 0


def agree_on_step(
    micro_batches: Sequence[MicroBatch],
    norms: Sequence[Tensor],
    scalers: Sequence[torch.amp.GradScaler],
    *,
    step: int,
    skips: Skips,
    ranks: Ranks,
    bad_images: BadImages,
    max_skipped_steps: int,
    stop_requested: bool = False,
    averaged: Sequence[Tensor] = (),
) -> Verdict:
    """Decide on all ranks which networks take their step; count and log non-finite values.

    A loss or gradient that is not finite on any rank skips the whole step on all ranks. If it is
    only a network's gradient in fp16, and its scale may be the cause, only this network's step is
    skipped, and its scale halved.

    Args:
        micro_batches: of this rank.
        norms: of each network's gradient.
        scalers: of the networks.
        step: for the log, counted from 1.
        skips: counts of skipped steps, updated.
        ranks: all of them call this.
        bad_images: list of unusable images, updated.
        max_skipped_steps: consecutive skipped steps that end the run.
        stop_requested: whether this rank was asked to stop.
        averaged: float32 scalars to average over the ranks, on the device.

    Raises:
        RunError: too many skipped steps in a row, or no image could replace a bad one.
    """
    bad = [image for micro in micro_batches for image in micro.bad]
    missing = any(not name for micro in micro_batches for name in micro.names)
    host_flags = torch.tensor([bool(bad), missing, stop_requested])
    # one sum over the ranks and one copy from the device for everything
    device = norms[0].device
    losses = torch.stack([micro.loss.to(device) for micro in micro_batches])
    finite = torch.stack([losses.isfinite().all(), *(norm.isfinite() for norm in norms)])
    one = torch.ones((), device=device)
    scaled = torch.stack([scaler.scale(one) > 1.0 for scaler in scalers])  # not if it is disabled
    flags = torch.cat([~finite, scaled, copy_to_device(host_flags, device)])
    sums = ranks.sum(torch.cat([flags.float(), *(value.reshape(1) for value in averaged)]))
    means = sums[len(flags) :] / ranks.world_size
    loss_broken, *of_networks, any_bad, any_missing, stop = sums[: len(flags)].bool().tolist()
    overflows, may_be_scale = of_networks[: len(norms)], of_networks[len(norms) :]
    if any_bad:
        bad_images.note(bad)
    if any_missing:
        example = "" if bad_images.latest is None else " ({}: {})".format(*bad_images.latest)
        raise RunError(
            f"no image can be read in place of a bad one{example}; check data.train.root"
        )
    by_scale = [overflow and scale for overflow, scale in zip(overflows, may_be_scale, strict=True)]
    if not loss_broken and overflows == by_scale:
        skips.in_a_row = 0
        skips.by_scaler += sum(by_scale)
        return Verdict([not overflow for overflow in overflows], stop, means)
    skips.total += 1
    skips.in_a_row += 1
    _log_skipped_step(step, losses.tolist(), micro_batches, ranks, skips)
    if skips.in_a_row >= max_skipped_steps:
        raise RunError(
            f"{max_skipped_steps} steps in a row had no finite loss or gradient: lower the "
            "learning rates, set training.precision to bf16 or fp32, or look at the images named "
            "above; training.max_skipped_steps is the limit"
        )
    return Verdict([False] * len(norms), stop, means)


def _log_skipped_step(
    step: int,
    losses: Sequence[float],
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    skips: Skips,
) -> None:
    """Log the images of the micro-batches that may be the cause; all ranks call this."""
    broken = [not abs(loss) < float("inf") for loss in losses]
    # if every loss is finite, the gradient was not, and any image may be the cause
    suspects = [m for m, b in zip(micro_batches, broken, strict=True) if b or not any(broken)]
    reports = ranks.gather((any(broken), [name for micro in suspects for name in micro.names]))
    causes = [rank for rank, (has_broken_loss, _) in enumerate(reports) if has_broken_loss]
    what = f"the loss on rank {', '.join(map(str, causes))}" if causes else "the gradient"
    if ranks.is_rank_zero:
        logger.warning(
            "step %d is skipped: %s is not finite (%d so far, %d in a row); its images:",
            step,
            what,
            skips.total,
            skips.in_a_row,
        )
        for rank in causes or range(len(reports)):
            logger.warning("  rank %d: %s", rank, ", ".join(reports[rank][1]))


class BadImages:
    """The images in bad_images.txt, one `path<TAB>reason` per line; every rank knows all of them.

    Args:
        run: the run's directory, whose list is appended to; None: nothing is written.
        ranks: all ranks of the run.
        number: of all training and validation images.
        max_fraction: maximum fraction of bad images.

    Attributes:
        latest: the image that was noted last; None: none yet.
    """

    def __init__(self, run: Path | None, ranks: Ranks, number: int, max_fraction: float) -> None:
        self._path = None if run is None else run / BAD_IMAGES
        self._ranks = ranks
        self._number = number
        self._max_fraction = max_fraction
        self._names = set(ranks.on_rank_zero(self._read))
        self.latest: BadImage | None = None

    def note(self, found: Sequence[BadImage]) -> None:
        """Add the bad images of this rank; a collective operation."""
        everything = [image for images in self._ranks.gather(list(found)) for image in images]
        new = {image.name: image for image in everything if image.name not in self._names}
        self._names |= new.keys()
        self.latest = everything[-1] if everything else self.latest
        if self._ranks.is_rank_zero:
            self._write(list(new.values()))

    @property
    def too_many(self) -> bool:
        """Whether more images are bad than allowed."""
        return len(self._names) > self._max_fraction * self._number

    def check(self) -> None:
        """Raise RunError if there are too many bad images."""
        if self.too_many:
            raise RunError(
                f"{len(self._names)} of {self._number} images cannot be used, more than "
                f"data.max_bad_fraction={self._max_fraction} ({self._path} lists them): raise it "
                "to train without them, or fix them and start in a new --run-dir"
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
            with open(self._path, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{name}\t{reason}\n" for name, reason in images)
        except OSError as error:  # they are in the log
            logger.warning("%s cannot be written (%s)", self._path, error.strerror)


class StopRequest:
    """A request to stop the run; `signal` is the name of the signal, None without a request."""

    signal: str | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal; a second one ends the process at once."""
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        logger.warning(
            "%s: stopping after this step; a second signal ends the run at once, without saving",
            self.signal,
        )


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM, SIGUSR1 and SIGHUP into a StopRequest, in the main thread."""
    request = StopRequest()
    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python delivers signals to the main thread only
    elif hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)  # nohup
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def workers_killed_on_error() -> Iterator[None]:
    """Kill the data workers if an error ends the run.

    A process that exits sends SIGTERM to its children and waits for them, but they ignore it.
    """
    before = multiprocessing.active_children()
    try:
        yield
    except Exception:
        main_thread = threading.current_thread() is threading.main_thread()
        numbers = [signal.SIGCHLD] if main_thread and hasattr(signal, "SIGCHLD") else []
        # torch's handler raises one more error per killed worker
        handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()
                process.join(5.0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        raise
