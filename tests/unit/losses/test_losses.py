"""How a lossconfig selects its loss."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae.losses import ELBO, LPIPSWithDiscriminator, build_loss, register_loss
from tests.messages import mentions


def test_none_has_no_loss_and_a_callable_is_its_own() -> None:
    def loss(*_: Any, **__: Any) -> None: ...

    assert build_loss(None) is None
    assert build_loss(loss) is loss  # type: ignore[arg-type]
    assert build_loss({"target": "torch.nn.Identity"}) is None  # as published for inference


@pytest.mark.parametrize("params", [{}, {"params": None}, {"params": {}}])
def test_a_registered_name_with_default_params(params: dict[str, Any]) -> None:
    loss = build_loss({"target": "elbo", **params})
    assert isinstance(loss, ELBO)
    assert loss.kl_weight == 1e-6


def test_params_reach_the_loss() -> None:
    loss = build_loss({"target": "elbo", "params": {"kl_weight": 0.5, "reconstruction": "l1"}})
    assert isinstance(loss, ELBO)
    assert (loss.kl_weight, loss.reconstruction) == (0.5, "l1")


def test_users_register_their_own() -> None:
    @register_loss("double")
    class Double(ELBO):
        pass

    assert type(build_loss({"target": "double"})) is Double
    with pytest.raises(ValueError, match="lossconfig.target='elbo': already registered"):
        register_loss("elbo")(Double)


def test_a_dotted_path_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_losses.py").write_text(
        "class Loss:\n    def __init__(self, weight=1.0):\n        self.weight = weight\nrate = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loss: Any = build_loss({"target": "my_own_losses.Loss", "params": {"weight": 2.0}})
    assert (type(loss).__module__, loss.weight) == ("my_own_losses", 2.0)
    with pytest.raises(ValueError, match="my_own_losses.rate: not a class or function"):
        build_loss({"target": "my_own_losses.rate"})


@pytest.mark.parametrize(
    ("lossconfig", "error"),
    [
        ({"target": "elbow"}, "lossconfig.target='elbow': unknown; choose one of elbo, lpips_wi"),
        ({"target": "no_such.Loss"}, "no_such.Loss: cannot be imported .*; choose one of elbo"),
        ({"target": "torch.NoLoss"}, "torch.NoLoss: cannot be imported .*; choose one of elbo"),
        (
            {"target": "elbo", "params": {"temperature": 1}},
            mentions("lossconfig.params", "temperature", "elbo", "reconstruction", "kl_weight"),
        ),
        (
            {"target": "elbo", "params": {"kl_wieght": 1}},
            mentions("lossconfig.params", "kl_wieght", "did you mean kl_weight?"),
        ),
        ({"target": "elbo", "parameters": {}}, "takes the keys target and params; write loss"),
        ({"params": {}}, "takes the keys target and params; write lossconfig"),
        ("elbo", "lossconfig='elbo': takes the keys target and params; write lossconfig"),
        ({"target": 3}, "target is a name and params are keys and values"),
        ({"target": "elbo", "params": [1]}, "target is a name and params are keys and values"),
    ],
)
def test_what_cannot_be_built_is_named(lossconfig: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        build_loss(lossconfig)


@pytest.mark.parametrize(
    "target",
    [
        "ldm.modules.losses.LPIPSWithDiscriminator",
        "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
        "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator",
    ],
)
def test_published_configs_name_the_adversarial_loss_in_their_way(target: str) -> None:
    params = {"disc_start": 50001, "perceptual_weight": 0.0}  # no network to be found
    loss = build_loss({"target": target, "params": params})
    assert isinstance(loss, LPIPSWithDiscriminator)
    assert loss.disc_start == 50001


def test_an_error_names_the_target_as_it_was_written() -> None:
    target = "ldm.modules.losses.LPIPSWithDiscriminator"
    with pytest.raises(ValueError, match="missing a required argument: 'disc_start'; ldm.modules."):
        build_loss({"target": target, "params": {}})


def test_a_loss_with_parameters_is_trained_with_the_model(tiny_ddconfig: dict[str, Any]) -> None:
    from kl_vae import AutoEncoderKL

    loss = ELBO(learn_logvar=True)
    model = AutoEncoderKL(tiny_ddconfig, 3, loss)
    assert model.loss is loss
    assert torch.equal(model.state_dict()["loss.logvar"], torch.zeros(()))
