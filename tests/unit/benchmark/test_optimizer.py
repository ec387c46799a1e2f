"""What a step with Muon costs, from what was measured."""

from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kl_vae.benchmark.optimizer import OptimizerCost, compare_optimizers
from kl_vae.benchmark.timing import Timing
from kl_vae.ddconfig import DDConfig

CPU = torch.device("cpu")


def at(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds)


def test_the_cost_of_a_step_by_hand() -> None:
    cost = OptimizerCost(size=256, images=12, image=at(0.5), adam=at(0.25), muon=at(2.0))
    assert cost.step_seconds() == {"Adam": 6.25, "Muon": 8.0, "Muon, its update / 8": 6.25}
    table = cost.markdown()
    assert "| one image of 256 x 256, forward and backward | 0.5 | 0.5 to 0.5 |" in table
    assert "| computed: a step of 12 images on a device | s | times Adam |" in table
    assert "| Muon | 8 | 1.280 |" in table
    assert "| Muon, its update / 8 | 6.25 | 1.000 |" in table


def test_each_part_is_measured(tiny_ddconfig: dict[str, Any]) -> None:
    ddconfig = DDConfig.from_dict(tiny_ddconfig)
    cost = compare_optimizers(ddconfig, 3, CPU, size=16, images=2, repeats=1)
    assert (cost.size, cost.images) == (16, 2)
    assert all(timing.low > 0.0 for timing in (cost.image, cost.adam, cost.muon))


def test_an_image_that_the_model_cannot_take_is_named(tiny_ddconfig: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="images of 17 x 17: width and height must be multiples"):
        compare_optimizers(DDConfig.from_dict(tiny_ddconfig), 3, CPU, size=17)


def test_both_optimizers_step_on_all_parameters_each_time(tiny_ddconfig: dict[str, Any]) -> None:
    seen: list[int] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(p.grad is not None for p in parameters)
        seen.append(len(parameters))

    handle = register_optimizer_step_pre_hook(note)
    try:
        compare_optimizers(DDConfig.from_dict(tiny_ddconfig), 3, CPU, size=16, repeats=2)
    finally:
        handle.remove()
    assert len(seen) == 6 and len(set(seen)) == 1  # a warm-up and two updates of each
