"""The optimiser's groups and its learning rate."""

from typing import Any

import pytest
import torch
from torch import nn

from kl_vae import AutoEncoderKL
from kl_vae.optim.config import (
    OptimizerConfig,
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
)
from kl_vae.optim.muon import Muon
from tests.messages import mentions


def test_only_weights_of_convolutions_and_linear_layers_are_decayed(
    tiny_ddconfig: dict[str, Any],
) -> None:
    lossconfig = {"target": "elbo", "params": {"learn_logvar": True}}
    model = AutoEncoderKL(tiny_ddconfig | {"context_channels": 4}, 3, lossconfig)
    optimizer = model.configure_optimizers(OptimizerConfig(weight_decay=0.1))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    weights = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert {id(parameter) for parameter in decayed["params"]} == weights
    assert {id(p) for p in others["params"]} == {id(p) for p in model.parameters()} - weights


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    groups = build_optimizer(layer.parameters(), OptimizerConfig()).param_groups
    assert [parameter for group in groups for parameter in group["params"]] == [layer.bias]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("muon", Muon)],
)
def test_the_config_reaches_the_optimizer(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    config = OptimizerConfig(
        name=name, learning_rate=0.5, adamw_learning_rate=0.25, betas=(0.5, 0.9), eps=1e-3
    )
    optimizer = build_optimizer(nn.Linear(2, 2).parameters(), config)
    assert type(optimizer) is kind
    matrices, others = optimizer.param_groups
    assert (matrices["lr"], others["lr"]) == (0.5, 0.25 if name == "muon" else 0.5)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.5, 0.9), 1e-3)


def test_a_first_step_of_adamw_moves_by_the_learning_rate_and_decays() -> None:
    weight = nn.Parameter(torch.tensor([[2.0, -4.0]]))
    bias = nn.Parameter(torch.tensor([2.0, -4.0]))
    optimizer = build_optimizer(
        [weight, bias], OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    )
    weight.grad, bias.grad = torch.tensor([[3.0, -7.0]]), torch.tensor([3.0, -7.0])
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.tensor([1.9, -3.9]))
    torch.testing.assert_close(weight.detach(), torch.tensor([[1.8, -3.7]]))


def test_the_rate_rises_linearly_and_is_whole_at_the_warm_ups_last_step() -> None:
    config = OptimizerConfig(learning_rate=0.8, warmup_steps=4)
    rates = [learning_rate_at(step, 100, config) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_a_constant_rate_stays() -> None:
    config = OptimizerConfig(learning_rate=0.8, min_learning_rate=0.1)
    assert {learning_rate_at(step, 100, config) for step in (0, 50, 99)} == {0.8}


def test_a_cosine_falls_to_the_lowest_rate_at_the_end() -> None:
    config = OptimizerConfig(
        learning_rate=0.8, warmup_steps=10, schedule="cosine", min_learning_rate=0.2
    )
    rates = [learning_rate_at(step, 110, config) for step in range(10, 112)]
    assert rates[0] == pytest.approx(0.8)
    assert rates[50] == pytest.approx(0.5)
    assert rates[25] == pytest.approx(0.2 + 0.6 * (1.0 + 0.5**0.5) / 2.0)
    assert rates[99] == pytest.approx(0.2, abs=1e-3)
    assert rates[100] == rates[101] == pytest.approx(0.2)
    assert rates[:101] == sorted(rates[:101], reverse=True)


def test_a_run_shorter_than_its_warm_up_never_reaches_the_cosine() -> None:
    config = OptimizerConfig(learning_rate=0.8, warmup_steps=8, schedule="cosine")
    assert learning_rate_at(3, 4, config) == pytest.approx(0.4)


def test_each_group_follows_the_schedule_below_its_own_peak() -> None:
    config = OptimizerConfig(
        name="muon", learning_rate=0.8, adamw_learning_rate=0.2, warmup_steps=4, schedule="cosine"
    )
    optimizer = build_optimizer(nn.Linear(2, 2).parameters(), config)
    for step in (1, 0, 4, 54):
        rate = set_learning_rate(optimizer, step, 104, config)
        assert rate == learning_rate_at(step, 104, config)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate / 4])


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"learning_rate": 0.0}, ("learning_rate=0.0", "1.0e-4")),
        ({"betas": (0.9,)}, ("betas=[0.9]",)),
        ({"betas": (0.9, 1.0)}, ("betas=[0.9, 1.0]",)),
        ({"eps": -1.0}, ("eps=-1.0",)),
        ({"weight_decay": -1.0}, ("weight_decay=-1.0",)),
        ({"warmup_steps": -1}, ("warmup_steps=-1", 0)),
        ({"min_learning_rate": 1.0}, ("min_learning_rate=1.0", "learning_rate=0.0001")),
        ({"clip_grad_norm": 0.0}, ("clip_grad_norm=0.0", "null")),
    ],
)
def test_invalid_values_are_named(keys: dict[str, Any], parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        OptimizerConfig(**keys)


def test_several_impossible_values_are_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        OptimizerConfig(eps=-1.0, warmup_steps=-1, clip_grad_norm=-1.0)
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "eps",
        "warmup_steps",
        "clip_grad_norm",
    ]
