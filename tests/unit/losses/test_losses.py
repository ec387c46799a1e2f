"""How a lossconfig selects its loss."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL, allow_import
from kl_vae.losses import ELBO, LPIPSWithDiscriminator, build_loss, register_loss
from kl_vae.runtime import imports
from kl_vae.runtime.config_file import load_model_params
from tests.messages import mentions


def test_none_and_callables() -> None:
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
    with pytest.raises(ValueError, match=mentions("lossconfig.target='elbo'", "registered")):
        register_loss("elbo")(Double)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The allowed prefixes, restored after the test."""
    prefixes: set[str] = set()
    monkeypatch.setattr(imports, "_PREFIXES", prefixes)
    return prefixes


def test_a_dotted_path_is_imported_below_an_allowed_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[str]
) -> None:
    (tmp_path / "my_own_losses.py").write_text(
        "from os import system\nfrom subprocess import Popen\nfrom torch import nn\n"
        "class Loss:\n    def __init__(self, weight=1.0):\n        self.weight = weight\nrate = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=mentions("my_own_losses.Loss", "--allow-import")):
        build_loss({"target": "my_own_losses.Loss"})
    assert "my_own_losses" not in sys.modules
    allow_import("my_own_losses")
    loss: Any = build_loss({"target": "my_own_losses.Loss", "params": {"weight": 2.0}})
    assert (type(loss).__module__, loss.weight) == ("my_own_losses", 2.0)
    with pytest.raises(ValueError, match=mentions("my_own_losses.rate", "class")):
        build_loss({"target": "my_own_losses.rate"})
    for name in ("system", "Popen", "nn.Identity", "no_such_loss", "Loss.__init__"):
        with pytest.raises(ValueError, match=mentions(f"my_own_losses.{name}")):
            build_loss({"target": f"my_own_losses.{name}"})


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "os.path.os.system", "subprocess.run", "builtins.exec", "my.packages.Loss"),
        *("pathlib.Path.touch", "torch.hub.load", "kl_vae.train", "no_such.Loss", "torch.NoLoss"),
    ],
)
def test_nothing_is_imported_without_an_allowed_prefix(target: str, allowed: set[str]) -> None:
    allow_import("my.package")
    with pytest.raises(ValueError, match=mentions(f"lossconfig.target={target}", "--allow-import")):
        build_loss({"target": target, "params": {}})


@pytest.mark.parametrize(
    "target", ["my..Loss", ".Loss", "my.", "my.Lo ss", "my.Loss()", "a/b.Loss"]
)
def test_what_is_no_dotted_path_is_named(target: str, allowed: set[str]) -> None:
    allow_import("my")
    with pytest.raises(ValueError, match=mentions(f"lossconfig.target={target!r}")):
        build_loss({"target": target})


@pytest.mark.parametrize("prefix", ["", ".", "my.", "*", "my package"])
def test_a_prefix_is_a_dotted_name(prefix: str) -> None:
    with pytest.raises(ValueError, match=mentions("allow_import", repr(prefix))):
        allow_import(prefix)


@pytest.mark.parametrize(
    ("lossconfig", "parts"),
    [
        ({"target": "elbow"}, ("lossconfig.target='elbow'", "elbo", "lpips_with_discriminator")),
        (
            {"target": "elbo", "params": {"temperature": 1}},
            ("lossconfig.params", "temperature", "elbo", "reconstruction", "kl_weight"),
        ),
        (
            {"target": "elbo", "params": {"kl_wieght": 1}},
            ("lossconfig.params", "kl_wieght", "kl_weight"),
        ),
        ({"target": "elbo", "parameters": {}}, ("'parameters': {}", "lossconfig: {target: elbo")),
        ({"params": {}}, ("lossconfig={'params': {}}", "lossconfig: {target: elbo")),
        ("elbo", ("lossconfig='elbo'", "lossconfig: {target: elbo")),
        ({"target": 3}, ("lossconfig={'target': 3}",)),
        ({"target": "elbo", "params": [1]}, ("lossconfig={'target': 'elbo', 'params': [1]}",)),
    ],
)
def test_an_invalid_lossconfig_is_named(lossconfig: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        build_loss(lossconfig)


@pytest.mark.parametrize(
    "target",
    [
        "ldm.modules.losses.LPIPSWithDiscriminator",
        "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
        "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator",
    ],
)
def test_published_names_of_the_adversarial_loss(target: str) -> None:
    params = {"disc_start": 50001, "perceptual_weight": 0.0}  # without a perceptual network
    loss = build_loss({"target": target, "params": params})
    assert isinstance(loss, LPIPSWithDiscriminator)
    assert loss.disc_start == 50001


@pytest.mark.parametrize("name", ["kl-f4", "kl-f8", "kl-f16", "kl-f32"])
def test_the_published_configs_train_what_the_optimiser_of_ldm_holds(
    name: str, tiny_ddconfig: dict[str, Any]
) -> None:
    lossconfig = load_model_params(f"{name}-published")["lossconfig"]
    lossconfig["params"]["perceptual_weight"] = 0.0  # without a perceptual network
    model = AutoEncoderKL(tiny_ddconfig, 3, lossconfig)
    # ldm.models.autoencoder.AutoencoderKL.configure_optimizers
    parts = (model.encoder, model.decoder, model.quant_conv, model.post_quant_conv)
    theirs = {id(p) for part in parts for p in part.parameters()}
    optimizers = model.configure_optimizers()
    assert isinstance(optimizers, list)
    held = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    assert held == theirs
    assert not any(id(p) in held for p in model.loss.parameters())  # type: ignore[union-attr]


def test_logvar_is_trained_under_a_published_name_if_asked() -> None:
    params = {"disc_start": 1, "perceptual_weight": 0.0, "learn_logvar": True}
    loss = build_loss({"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params})
    assert isinstance(loss, LPIPSWithDiscriminator)
    assert loss.logvar.requires_grad


def test_an_error_names_the_target_of_the_config() -> None:
    target = "ldm.modules.losses.LPIPSWithDiscriminator"
    with pytest.raises(
        ValueError, match=mentions("missing a required argument: 'disc_start'", target)
    ):
        build_loss({"target": target, "params": {}})


def test_a_loss_with_parameters_is_trained_with_the_model(tiny_ddconfig: dict[str, Any]) -> None:
    loss = ELBO(learn_logvar=True)
    model = AutoEncoderKL(tiny_ddconfig, 3, loss)
    assert model.loss is loss
    assert torch.equal(model.state_dict()["loss.logvar"], torch.zeros(()))
