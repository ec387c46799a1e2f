"""What ended a run, in words that say what to do."""

from __future__ import annotations

import torch
import torch.distributed as dist

from kl_vae.errors import RunError
from kl_vae.training.roll_call import RollCall


def explain(error: Exception, roll_call: RollCall | None) -> Exception:
    """Return what to raise in place of `error`: a RunError where it has a known cause.

    Among several ranks the others are told why this one ends, or asked which of them was lost.
    """
    failure = _failure(error, roll_call)
    if roll_call is not None:
        roll_call.leave(str(failure) or type(failure).__name__)
    return failure


def _failure(error: Exception, roll_call: RollCall | None) -> Exception:
    text = " ".join(str(error).split())
    if isinstance(error, (RunError, ValueError)):
        return error
    if roll_call is not None and _is_of_another_rank(error):
        return RunError(
            f"{roll_call.lost()}; the same command goes on from the last checkpoint ({text})"
        )
    if isinstance(error, RuntimeError) and "DataLoader timed out" in text:
        return RunError(
            f"the data workers gave no batch within training.timeout_seconds ({text}): "
            "look at the storage of data.train.root, or raise it"
        )
    noticed = isinstance(error, RuntimeError) and "DataLoader worker (pid" in text
    # or it was handing over a batch when it was killed, and torch does not notice that it was
    if noticed or isinstance(error, (ConnectionError, EOFError)):
        return RunError(
            f"a data worker ended ({text or type(error).__name__}): mostly memory ran out (dmesg, "
            "free -h) or /dev/shm is full (df -h /dev/shm); lower data.num_workers, or give more "
            "of it"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(
            f"the memory of the GPU does not suffice ({text}): raise training.accumulate_batches, "
            "or set training.precision=bf16"
        )
    if isinstance(error, OSError):
        return RunError(f"{text}; mend it and give the same command again")
    return error


def _is_of_another_rank(error: Exception) -> bool:
    """Whether a collective operation failed, which is what the loss of a rank looks like."""
    # gloo has no type of its own; each of its errors names its source file
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
