"""What ended a run or a command, in words that say what to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from kl_vae.distributed.roll_call import RollCall
from kl_vae.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Mends:
    """How the work that was ended is asked for less, and taken up again."""

    resume: str
    timeout: str
    images: str
    workers: str
    memory: str


TRAINING = Mends(
    resume="the same command goes on from the last checkpoint",
    timeout="training.timeout_seconds",
    images="data.train.root",
    workers="data.num_workers",
    memory="set training.activation_checkpointing=blocks, or raise training.accumulate_batches",
)
COMMAND = Mends(
    resume="the same command with --resume goes on where it was",
    timeout="the time limit",
    images="--images",
    workers="--num-workers",
    memory="lower --batch-size, or give --precision bf16",
)


def explain(error: Exception, roll_call: RollCall | None, mends: Mends = TRAINING) -> Exception:
    """Return what to raise in place of `error`: a RunError where it has a known cause.

    Among several ranks the others are told why this one ends, or asked which of them was lost.
    """
    failure = _failure(error, roll_call, mends)
    if roll_call is not None:
        roll_call.leave(str(failure) or type(failure).__name__)
    return failure


def _failure(error: Exception, roll_call: RollCall | None, mends: Mends) -> Exception:
    text = " ".join(str(error).split())
    if isinstance(error, (RunError, ValueError)):
        return error
    if roll_call is not None and _is_of_another_rank(error):
        return RunError(f"{roll_call.lost()}; {mends.resume} ({text})")
    if isinstance(error, RuntimeError) and "DataLoader timed out" in text:
        return RunError(
            f"the data workers gave no batch within {mends.timeout} ({text}): "
            f"look at the storage of {mends.images}, or raise it"
        )
    noticed = isinstance(error, RuntimeError) and "DataLoader worker (pid" in text
    # or it was handing over a batch when it was killed, and torch does not notice that it was
    if noticed or isinstance(error, (ConnectionError, EOFError)):
        return RunError(
            f"a data worker ended ({text or type(error).__name__}): mostly memory ran out (dmesg, "
            f"free -h) or /dev/shm is full (df -h /dev/shm); lower {mends.workers}, or give more "
            "of it"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(f"the memory of the GPU does not suffice ({text}): {mends.memory}")
    if isinstance(error, OSError):
        return RunError(f"{text}; mend it and give the same command again")
    return error


def _is_of_another_rank(error: Exception) -> bool:
    """Whether a collective operation failed, which is what the loss of a rank looks like."""
    # gloo has no type of its own; each of its errors names its source file
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
