"""Model parameters of pretrained weights, and matching of weights to a model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from kl_vae.blocks import NORM_GROUPS
from kl_vae.checkpoints.architecture import (
    Architecture,
    check_stated,
    infer_architecture,
    not_stated,
    other_model,
)
from kl_vae.checkpoints.reading import Weights
from kl_vae.ddconfig import DDConfig, check_autoencoder
from kl_vae.latents import LatentNormalization
from kl_vae.runtime.schema import from_mapping

logger = logging.getLogger(__name__)

# prefix of the tensors of a loss; a model may be loaded with another loss or without one
_LOSS = "loss."

# of a discriminator: loaded whole, or not at all
_ADVERSARY = ("loss.discriminator", "loss.logits_average")


def complete_params(weights: Weights, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the complete `model.params` of an autoencoder's weights, without a loss.

    Args:
        weights: weights read from a file.
        given: `model.params` given by the user; None: use the config in the file, or infer the
            architecture from the tensors.

    Returns:
        ddconfig (a DDConfig), embed_dim, colorize_nlabels, monitor and latents.

    Raises:
        ValueError: The config is invalid, the tensors have a different architecture, or it cannot
            be inferred. Each line of the message begins with the file.
    """
    if given is not None and not {"ddconfig", "embed_dim"} <= given.keys():
        raise ValueError(
            f"{weights.source}: its config has no ddconfig or embed_dim; give a complete config"
        )
    own = weights.params or {}
    said = given or (own if {"ddconfig", "embed_dim"} <= own.keys() else None)
    known = _inferred(weights) if said is None else said
    embed_dim, colorize = known["embed_dim"], weights.tensors.get("colorize")
    # [3, channels, 1, 1]
    colorize_nlabels = colorize.shape[1] if colorize is not None and colorize.ndim == 4 else None
    latents = known.get("latents") or stated_latents(weights)
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
    if said is None:
        logger.info(
            "%s: has no config; assumed is what its tensors do not show: %s",
            weights.source,
            not_stated(config),
        )
    check_stated(config, weights.params, weights.source)
    return {
        "ddconfig": config,
        "embed_dim": embed_dim,
        "colorize_nlabels": colorize_nlabels,
        "monitor": known.get("monitor"),
        "latents": latents,
    }


def stated_latents(weights: Weights) -> Mapping[str, Any] | None:
    """Return the normalisation of latents that a file states, as `model.params.latents`."""
    latents: Mapping[str, Any] | None = (weights.params or {}).get("latents") or weights.latents
    return latents


def has_published_parts(config: DDConfig) -> bool:
    """Return whether all parts of the model are built-in, none registered by the user."""
    kinds = (config.norm_type, config.block_type)
    return kinds == ("group", "resnet") and config.attention in ("vanilla", "linear", "none")


def _inferred(weights: Weights) -> Mapping[str, Any]:
    params = infer_architecture(weights.tensors, weights.source).params()
    ch = params["ddconfig"]["ch"]
    if ch % NORM_GROUPS:  # all published autoencoders use NORM_GROUPS
        raise ValueError(
            f"{weights.source}: cannot infer norm_groups for {ch} channels from its tensors; give "
            "its config"
        )
    return params


def _check(weights: Weights, config: DDConfig, embed_dim: int | None) -> None:
    """Compare the config with the tensors before a model of unlimited size is built from it."""
    shown = infer_architecture(weights.tensors, weights.source)
    said = Architecture.of_params(dataclasses.asdict(config), embed_dim)
    if shown != said:
        raise ValueError(
            f"{weights.source}: its tensors have {shown.differences(said)}; use the config it was "
            "trained with"
        )


def match(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    ignore_keys: Iterable[str] = (),
    source: str = "",
) -> dict[str, Tensor]:
    """Return the tensors that match a model's state dict, and log the number of each kind.

    Args:
        own: state dict of the model.
        tensors: state dict of the checkpoint, in the same layout.
        ignore_keys: prefixes of keys to ignore in both.
        source: name of the checkpoint in log and error messages.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape and not in `ignore_keys`.
            Tensors of a loss may be missing or unexpected, except those of a discriminator if both
            have one. Or a tensor contains NaN or infinity.
    """
    prefixes = tuple(ignore_keys)
    both = all(any(key.startswith(_ADVERSARY[0]) for key in keys) for keys in (own, tensors))

    def is_optional(key: str) -> bool:
        return key.startswith(_LOSS) and not (both and key.startswith(_ADVERSARY))

    given = {
        key: x
        for key, x in tensors.items()
        if not key.startswith(prefixes) and (key in own or not is_optional(key))
    }
    fitting = {key: x for key, x in given.items() if key in own and x.shape == own[key].shape}
    misshapen = [key for key in given if key in own and key not in fitting]
    unexpected = [key for key in given if key not in own]
    missing = [
        key
        for key in own
        if key not in given and not key.startswith(prefixes) and not is_optional(key)
    ]
    if misshapen or unexpected or missing:
        raise ValueError(f"{source}: {_mismatch(own, given, misshapen, unexpected, missing)}")
    for key, x in fitting.items():
        if not x.isfinite().all():
            raise ValueError(f"{source}: {key} contains NaN or infinity; use other weights")
    not_used = [key for key in tensors if key not in given]
    not_set = [key for key in own if key not in fitting]
    logger.info(
        "%s: %d tensors loaded%s%s",
        source,
        len(fitting),
        _listed(not_used, "of the file not used", "of a loss that this model does not have"),
        _listed(not_set, "of the model keep their values", "of a loss that the file does not have"),
    )
    return fitting


def _listed(keys: list[str], what: str, of_loss: str) -> str:
    """Return how many tensors were left out, the first of them, and why; empty: none."""
    if not keys:
        return ""
    reasons = {of_loss if key.startswith(_LOSS) else "named in ignore_keys" for key in keys}
    first = ascii(keys[0])[1:-1]
    return (
        f"; {len(keys)} {what} ({first}{', ...' * (len(keys) > 1)}: {', '.join(sorted(reasons))})"
    )


def _mismatch(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    misshapen: list[str],
    unexpected: list[str],
    missing: list[str],
) -> str:
    """Return an error message for weights that do not match the model."""
    if own.keys().isdisjoint(given) and (model := other_model(given)) is not None:
        return f"{model}; give those of an autoencoder"
    try:
        found, expected = infer_architecture(given, "the file"), infer_architecture(own, "model")
        if found != expected:
            return (
                f"its tensors have {found.differences(expected)}; use the config it was trained "
                "with"
            )
    except ValueError:  # incomplete, or with blocks registered by the user
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
    problems = [*misshapen, *missing, *unexpected]
    fix = "use the config it was trained with, or add them to ignore_keys"
    if all(key.startswith(_ADVERSARY) for key in problems):
        prefixes = [p for p in _ADVERSARY if any(key.startswith(p) for key in problems)]
        fix = (
            "use the lossconfig it was trained with (disc_norm, lecam_weight and others), or set "
            f"ignore_keys=[{', '.join(prefixes)}] to start without them"
        )
    return f"{', '.join(parts)}; {fix}"
