"""The moving average of the weights."""

from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.training.ema import WeightAverage


def move(model: AutoEncoderKL, by: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


def test_the_decay_grows_to_its_maximum(tiny_model: AutoEncoderKL) -> None:
    average = WeightAverage(tiny_model, 0.25)
    start = tiny_model.get_last_layer().detach().clone()
    average.update()  # the first is a copy
    assert torch.equal(average.model.get_last_layer(), start)
    expected = 0.0
    for n in range(1, 6):
        move(tiny_model, 1.0)
        average.update()
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        difference = average.model.get_last_layer() - start
        assert torch.allclose(difference, torch.tensor(expected), atol=1e-5)
    assert average.updates == 6


def test_the_loss_is_not_averaged(tiny_ddconfig: dict[str, Any]) -> None:
    loss = {"target": "elbo", "params": {"learn_logvar": True}}
    model = AutoEncoderKL(tiny_ddconfig, 3, loss)
    average = WeightAverage(model, 0.9)
    assert average.state_dict().keys() == model.state_dict().keys() - {"loss.logvar"}
    assert not any(p.requires_grad for p in average.model.parameters())
    assert not average.model.training
    assert model.training and model.loss is not None  # the model itself is unchanged
    pairs = zip(average.model.parameters(), model.parameters(), strict=False)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_a_restored_average_continues_identically(tiny_ddconfig: dict[str, Any]) -> None:
    averages = []
    for stops in (False, True):
        torch.manual_seed(0)
        model = AutoEncoderKL(tiny_ddconfig, 3)
        average = WeightAverage(model, 0.9)
        for step in range(4):
            if stops and step == 2:
                saved, updates = average.state_dict(), average.updates
                average = WeightAverage(model, 0.9)
                average.load_state_dict(saved, updates)
            move(model, 0.1)
            average.update()
        averages.append(average.state_dict())
    for key, value in averages[0].items():
        assert torch.equal(value, averages[1][key]), key


def test_without_loss_shares_everything_else(tiny_model: AutoEncoderKL) -> None:
    tiny_model.loss = lambda *_: None  # type: ignore[assignment,return-value]
    bare = tiny_model.without_loss()
    assert bare.loss is None and tiny_model.loss is not None
    assert bare.encoder is tiny_model.encoder
    with pytest.raises(AttributeError):
        bare.no_such_thing  # noqa: B018
