"""Freezing parameters by patterns of their names."""

import pytest
from kl_vae.training.freeze import freeze

from kl_vae import AutoEncoderKL


def test_patterns_choose_by_name(tiny_model: AutoEncoderKL) -> None:
    freeze(tiny_model, ["encoder.*", "quant_conv.*", "decoder.*.bias"])
    for name, p in tiny_model.named_parameters():
        frozen = name.startswith(("encoder.", "quant_conv.")) or (
            name.startswith("decoder.") and name.endswith(".bias")
        )
        assert p.requires_grad != frozen, name
    assert len(tiny_model.own_parameters()) == sum(p.requires_grad for p in tiny_model.parameters())


def test_no_pattern_freezes_nothing(tiny_model: AutoEncoderKL) -> None:
    freeze(tiny_model, ())
    assert all(p.requires_grad for p in tiny_model.parameters())


@pytest.mark.parametrize(
    ("patterns", "error"),
    [
        (["encoder"], r"training.freeze=encoder: no parameter has such a name; there are encoder"),
        (["*"], "training.freeze: leaves nothing of the autoencoder to train; drop some"),
    ],
)
def test_what_makes_no_sense_is_named(
    patterns: list[str], error: str, tiny_model: AutoEncoderKL
) -> None:
    with pytest.raises(ValueError, match=error):
        freeze(tiny_model, patterns)
