"""How a step's images are divided, at the start and on a resume, and what is frozen."""

import pytest

from kl_vae import AutoEncoderKL
from kl_vae.training.config import TrainingConfig
from kl_vae.training.setup import divide_batch, freeze


def config(images: int = 24, accumulate: int = 1) -> TrainingConfig:
    return TrainingConfig(global_batch_size=images, accumulate_batches=accumulate, max_steps=1)


def test_a_new_run_does_as_configured() -> None:
    assert divide_batch(config(24, 3), 2) == (3, {"accumulate_batches": 3, "micro_batch_size": 4})


def test_what_cannot_be_divided_is_refused() -> None:
    text = (
        "global_batch_size=24: cannot be divided among 5 ranks x 1 accumulated batches; use a mul"
    )
    with pytest.raises(ValueError, match=text):
        divide_batch(config(), 5)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("before", [1, 2, 3, 6])
@pytest.mark.parametrize("now", [1, 2, 3, 4, 6, 8, 12, 24])
def test_another_number_of_ranks_never_has_larger_micro_batches(
    accumulate: int, before: int, now: int
) -> None:
    first, plan = divide_batch(config(24, accumulate), before)
    again, carried = divide_batch(config(24, accumulate), now, plan)
    assert carried == plan
    assert 24 % (now * again) == 0
    micro_batch_size = 24 // (now * again)
    assert micro_batch_size <= plan["micro_batch_size"]
    if again > 1:  # and no more of them than that takes
        fewer = [n for n in range(1, again) if 24 % (now * n) == 0]
        assert all(24 // (now * n) > plan["micro_batch_size"] for n in fewer)
    # and back
    assert divide_batch(config(24, accumulate), before, carried) == (first, plan)


def test_a_number_of_ranks_that_does_not_divide_is_refused() -> None:
    _, plan = divide_batch(config(24), 2)
    text = "global_batch_size=24: cannot be divided among 5 ranks; resume on a number of ranks that"
    with pytest.raises(ValueError, match=text):
        divide_batch(config(24), 5, plan)


def test_another_accumulation_is_taken_as_given() -> None:
    _, plan = divide_batch(config(24, 1), 2)
    assert divide_batch(config(24, 6), 2, plan) == (
        6,
        {"accumulate_batches": 6, "micro_batch_size": 2},
    )


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
        (["encoder"], r"training.freeze=encoder: matches no parameter; there are encoder"),
        (["*"], "training.freeze: leaves nothing of the autoencoder to train; drop some"),
    ],
)
def test_what_makes_no_sense_is_named(
    patterns: list[str], error: str, tiny_model: AutoEncoderKL
) -> None:
    with pytest.raises(ValueError, match=error):
        freeze(tiny_model, patterns)
