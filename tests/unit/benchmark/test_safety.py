"""What the guards cost, from what was measured."""

from kl_vae.benchmark.safety import SAVE, SafetyCost
from kl_vae.benchmark.timing import Timing


def at(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds)


def test_the_shares_of_a_step_by_hand() -> None:
    guards = {"flags": (at(0.001), 1), "checksums": (at(0.5), 100), SAVE: (at(6.0), 1000)}
    cost = SafetyCost(ranks=2, step=at(0.5), guards=guards, plain_save=at(5.0))
    assert cost.share("flags") == 0.001 / 0.5
    assert cost.share("checksums") == 0.5 / 100 / 0.5
    assert cost.share(SAVE) == (6.0 - 5.0) / 1000 / 0.5  # what a save costs anyhow is left out
    assert cost.total == sum(map(cost.share, guards))
    table = cost.markdown()
    assert "| flags | 0.001 | 0.001 to 0.001 | 1 | 0.2000% |" in table
    assert "| all | | | | 1.4000% |" in table
    assert "A step takes 0.5 s; ranks: 2." in table
    assert cost.markdown().splitlines()[-1].endswith("beyond a plain torch.save, 5 s.")


def test_a_plain_save_that_happens_to_be_slower_is_no_gain() -> None:
    cost = SafetyCost(1, at(1.0), {SAVE: (at(4.0), 1000)}, plain_save=at(5.0))
    assert cost.share(SAVE) == 0.0
