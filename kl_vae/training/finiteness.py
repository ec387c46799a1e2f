"""Whether a step may be taken: only where all numbers of it are finite, on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kl_vae.data import BadImage
from kl_vae.distributed.ranks import Ranks
from kl_vae.errors import RunError
from kl_vae.training.bad_images import BadImages
from kl_vae.training.skips import Skips
from kl_vae.training.updater import Updater


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
