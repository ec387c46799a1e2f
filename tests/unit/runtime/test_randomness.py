"""Draws depend on their key alone."""

import torch

from kl_vae.runtime.randomness import generator_for


def draw(*key: int | str) -> list[int]:
    return torch.randint(1 << 30, (4,), generator=generator_for(*key)).tolist()


def test_a_key_gives_the_same_draws_whenever_it_is_used() -> None:
    first = draw("crop", 0, 1, 2)
    torch.manual_seed(99)
    draw("crop", 5)
    assert draw("crop", 0, 1, 2) == first


def test_torchs_own_generator_is_left_as_it_is() -> None:
    before = torch.get_rng_state()
    draw("crop", 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_keys_give_other_draws() -> None:
    keys = [("a",), ("b",), ("a", 0), ("a", 1), ("a", 0, 1), ("a", 1, 0), ("a", "0"), ("a", -1)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_the_draws_never_change_between_versions() -> None:
    assert generator_for("augment", 1, 2, 3).initial_seed() == 1845139320813956537
