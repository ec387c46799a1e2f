"""Dividing the images of a step, at the start and on resume, and frozen parameters."""

import dataclasses
from typing import Any

import pytest

from kl_vae import AutoEncoderKL
from kl_vae.training.config import RunConfig, TrainingConfig
from kl_vae.training.run_directory import flatten
from kl_vae.training.setup import check_same_config, divide_batch, freeze
from tests.messages import mentions


def config(images: int = 24, accumulate: int = 1) -> TrainingConfig:
    return TrainingConfig(global_batch_size=images, accumulate_batches=accumulate, max_steps=1)


def test_a_new_run_divides_as_configured() -> None:
    assert divide_batch(config(24, 3), 2) == (3, {"accumulate_batches": 3, "micro_batch_size": 4})


def test_an_indivisible_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=mentions("training.global_batch_size=24", 5, 1)):
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
    if again > 1:  # no more than needed
        fewer = [n for n in range(1, again) if 24 % (now * n) == 0]
        assert all(24 // (now * n) > plan["micro_batch_size"] for n in fewer)
    # and back
    assert divide_batch(config(24, accumulate), before, carried) == (first, plan)


def test_an_indivisible_number_of_ranks_is_an_error() -> None:
    _, plan = divide_batch(config(24), 2)
    with pytest.raises(ValueError, match=mentions("training.global_batch_size=24", 5, "ranks")):
        divide_batch(config(24), 5, plan)


def test_a_changed_accumulation_is_used() -> None:
    _, plan = divide_batch(config(24, 1), 2)
    assert divide_batch(config(24, 6), 2, plan) == (
        6,
        {"accumulate_batches": 6, "micro_batch_size": 2},
    )


def test_patterns_match_parameter_names(tiny_model: AutoEncoderKL) -> None:
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
    ("patterns", "parts"),
    [
        (["encoder"], ("training.freeze=encoder", "encoder.conv_in.weight", "encoder.*")),
        (["*"], ("training.freeze",)),
    ],
)
def test_invalid_patterns_are_named(
    patterns: list[str], parts: tuple[str, ...], tiny_model: AutoEncoderKL
) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        freeze(tiny_model, patterns)


class RankOne:
    """Rank 1 of two: rank 0 has the config `first`."""

    rank = 1

    def __init__(self, first: RunConfig) -> None:
        self._first = flatten(dataclasses.asdict(first))

    def on_rank_zero(self, _: object) -> dict[str, Any]:
        return self._first


def test_ranks_with_different_configs_are_an_error() -> None:
    first = RunConfig.load("example")
    other = RunConfig.load("example", ["optimizer.learning_rate=0.5", "data.num_workers=1"])
    error = mentions("rank 1", "optimizer.learning_rate=0.5", "0.0001")
    with pytest.raises(ValueError, match=error):
        check_same_config(other, RankOne(first))  # type: ignore[arg-type]
    harmless = RunConfig.load("example", ["data.num_workers=1", "data.train.root=elsewhere"])
    check_same_config(harmless, RankOne(first))  # type: ignore[arg-type]
