"""Which tensors of a checkpoint go into a model, and why others do not."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor

from kl_vae.checkpoints.architecture import infer_architecture

logger = logging.getLogger(__name__)

# a loss has its own tensors: a model may be given another loss than it was trained with, or none
_LOSS = "loss."


def match(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    ignore_keys: Iterable[str] = (),
    source: str = "",
) -> dict[str, Tensor]:
    """Return those of `tensors` that fit `own`, and say in one log line what became of all.

    Args:
        own: the model's state dict.
        tensors: the checkpoint's, in the same layout.
        ignore_keys: beginnings of keys that are left out, on both sides.
        source: where the tensors come from, for log line and errors.

    Raises:
        ValueError: missing, unexpected or differently shaped tensors that `ignore_keys` does not
            name; those of a loss may be missing or unexpected.
    """
    prefixes = tuple(ignore_keys)
    given = {
        key: x
        for key, x in tensors.items()
        if not key.startswith(prefixes) and (key in own or not key.startswith(_LOSS))
    }
    fitting = {key: x for key, x in given.items() if key in own and x.shape == own[key].shape}
    misshapen = [key for key in given if key in own and key not in fitting]
    unexpected = [key for key in given if key not in own]
    missing = [key for key in own if key not in given and not key.startswith((*prefixes, _LOSS))]
    if misshapen or unexpected or missing:
        raise ValueError(f"{source}: {_mismatch(own, given, misshapen, unexpected, missing)}")
    logger.info(
        "%s: %d tensors loaded, %d ignored, %d missing, 0 unexpected",
        source,
        len(fitting),
        len(tensors) - len(given),
        len(own) - len(fitting),
    )
    return fitting


def _mismatch(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    misshapen: list[str],
    unexpected: list[str],
    missing: list[str],
) -> str:
    """One line on weights that do not fit, and what to mend."""
    try:
        theirs, ours = infer_architecture(given, "the file"), infer_architecture(own, "the model")
        if theirs != ours:
            return (
                f"its tensors have {theirs.differences(ours)}; use the config it was trained with"
            )
    except ValueError:  # part of an autoencoder, or one of the user's own blocks
        pass
    parts = []
    if misshapen:
        parts.append(
            f"{len(misshapen)} tensors of another shape ({misshapen[0]}: "
            f"{list(given[misshapen[0]].shape)} in the file, "
            f"{list(own[misshapen[0]].shape)} in the model)"
        )
    if missing:
        parts.append(f"{len(missing)} missing (such as {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected (such as {ascii(unexpected[0])[1:-1]})")
    return ", ".join(parts) + "; use the config it was trained with, or name them in ignore_keys"
