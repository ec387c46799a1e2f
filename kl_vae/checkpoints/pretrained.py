"""Which model the weights of a file are of: what its config says, checked against its tensors."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kl_vae.blocks import NORM_GROUPS
from kl_vae.checkpoints.architecture import Architecture, infer_architecture
from kl_vae.checkpoints.checkpoint import write_checkpoint
from kl_vae.checkpoints.reading import Weights, read_weights
from kl_vae.ddconfig import DDConfig, check_autoencoder
from kl_vae.latents import LatentNormalization
from kl_vae.runtime.schema import from_mapping

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


def complete_params(weights: Weights, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`model.params` of the autoencoder whose weights these are, without a loss.

    Args:
        weights: as read from a file.
        given: `model.params` that the user gives; None: as the file says, else as the names and
            shapes of its tensors show.

    Returns:
        ddconfig (a DDConfig), embed_dim, colorize_nlabels, monitor and latents.

    Raises:
        ValueError: the tensors are of another architecture, or of none that can be described; each
            line names the file.
    """
    if given is not None and not {"ddconfig", "embed_dim"} <= given.keys():
        raise ValueError(
            f"{weights.source}: its config lacks ddconfig or embed_dim; give its config"
        )
    own = weights.params or {}
    said = given or (own if {"ddconfig", "embed_dim"} <= own.keys() else None)
    known = _inferred(weights) if said is None else said
    embed_dim, colorize = known["embed_dim"], weights.tensors.get("colorize")
    # [3, channels, 1, 1]
    colorize_nlabels = colorize.shape[1] if colorize is not None and colorize.ndim == 4 else None
    latents = known.get("latents") or own.get("latents") or weights.latents
    try:
        config = from_mapping(DDConfig, known["ddconfig"], "ddconfig")
        check_autoencoder(config, embed_dim, colorize_nlabels)
        if latents is not None:
            latents = from_mapping(LatentNormalization, latents, "latents")
            latents.check_channels(config.z_channels if embed_dim is None else embed_dim)
    except ValueError as error:
        lines = (f"{weights.source}: {line}" for line in str(error).splitlines())
        raise ValueError("\n".join(lines)) from None
    if said is not None and has_published_parts(config):
        _check(weights, config, embed_dim)
    return {
        "ddconfig": config,
        "embed_dim": embed_dim,
        "colorize_nlabels": colorize_nlabels,
        "monitor": known.get("monitor"),
        "latents": latents,
    }


def has_published_parts(config: DDConfig) -> bool:
    """Whether no part of it is one that the user has registered."""
    kinds = (config.norm_type, config.block_type)
    return kinds == ("group", "resnet") and config.attention in ("vanilla", "linear", "none")


def export_checkpoint(
    source: str | Path, out: Path, ema: bool = True, given: Mapping[str, Any] | None = None
) -> str:
    """Write an autoencoder's weights and its config alone, as one of our checkpoints.

    Args:
        source: what `read_weights` takes.
        out: the file to write.
        ema: the moving average of the weights, where there is one.
        given: as for `complete_params`.

    Returns:
        What was written, in words.

    Raises:
        ValueError: `source` holds no autoencoder, or `out` exists or cannot be written.
    """
    weights = read_weights(source, ema)
    params = complete_params(weights, given)
    for key in ("ddconfig", "latents"):
        params[key] = params[key] and dataclasses.asdict(params[key])
    tensors = {key: x for key, x in weights.tensors.items() if not key.startswith("loss.")}
    write_export(out, tensors, params, weights.step)
    kind = "averaged weights" if weights.averaged else "weights"
    step = "" if weights.step is None else f" of step {weights.step}"
    return f"{kind}{step} ({len(tensors)} tensors)"


def write_export(
    out: Path, tensors: Mapping[str, Tensor], params: Mapping[str, Any], step: int | None = None
) -> None:
    """Write a checkpoint of an autoencoder alone.

    Args:
        out: the file to write.
        tensors: of the CompVis layout, without a loss.
        params: `model.params`, plain values.
        step: of the run that trained it, where that is known.

    Raises:
        ValueError: `out` exists or cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; name a file that does not")
    config = {"model": {"params": params}}
    try:
        write_checkpoint(out, {"model": dict(tensors), "config": config, "step": step})
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error}); choose another place") from None


def _inferred(weights: Weights) -> Mapping[str, Any]:
    params = infer_architecture(weights.tensors, weights.source).params()
    ch = params["ddconfig"]["ch"]
    if ch % NORM_GROUPS:  # those of every published autoencoder
        raise ValueError(
            f"{weights.source}: its tensors do not show into how many groups its {ch} channels are "
            "normalised (norm_groups); give its config"
        )
    return params


def _check(weights: Weights, config: DDConfig, embed_dim: int | None) -> None:
    """Compare before anything is built: a config that lies could ask for any amount of memory."""
    shown = infer_architecture(weights.tensors, weights.source)
    said = Architecture.of_params(dataclasses.asdict(config), embed_dim)
    if shown != said:
        raise ValueError(
            f"{weights.source}: its tensors have {shown.differences(said)}; use the config it was "
            "trained with"
        )
