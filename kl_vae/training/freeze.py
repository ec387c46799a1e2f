"""Which parameters of the autoencoder are not trained."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from kl_vae.model import AutoEncoderKL


def freeze(model: AutoEncoderKL, patterns: Iterable[str]) -> None:
    """Freeze the parameters whose names match one of `patterns`, such as `encoder.*`.

    Raises:
        ValueError: a pattern that matches none, or patterns that leave nothing to train.
    """
    names = [name for name, _ in model.without_loss().named_parameters()]
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(
                f"training.freeze={pattern}: no parameter has such a name; there are "
                f"{names[0]}, {names[len(names) // 2]} and {len(names) - 2} others; write "
                "encoder.* for the whole encoder"
            )
        for name in matching:
            model.get_parameter(name).requires_grad_(False)
    if not any(model.get_parameter(name).requires_grad for name in names):
        raise ValueError("training.freeze: leaves nothing of the autoencoder to train; drop some")
