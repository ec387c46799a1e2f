"""The published adversarial step, on the same weights: losses, logs, weight and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae import AutoEncoderKL
from kl_vae.losses import LPIPSWithDiscriminator

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "adversarial_step.pt"

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_file(), reason=f"the reference tensors are not there: {GOLDEN}"
)

# what only a discriminator that runs can tell: ours does not, before disc_start
NEEDS_DISCRIMINATOR = {"train/d_weight", "train/g_loss"}


def perceptual(x: Tensor, y: Tensor) -> Tensor:
    """What stood in for LPIPS where the reference was made."""
    return (F.avg_pool2d(x, 2) - F.avg_pool2d(y, 2)).square().mean((1, 2, 3), keepdim=True)


def close(ours: Tensor, theirs: Tensor, largest: float | None = None) -> None:
    """Within 1e-5 of the largest value, or the rounding of a mean over numbers of size 1."""
    assert ours.shape == theirs.shape
    bound = float(theirs.abs().max()) if largest is None else largest
    assert float((ours.detach() - theirs).abs().max()) <= max(1e-5 * bound, 1e-7)


def gradients_are_close(module: nn.Module, theirs: dict[str, Tensor]) -> None:
    """Each within 1e-5 of its largest value.

    A bias that a norm takes away again has only rounding as its gradient: it is compared with the
    largest of all gradients.
    """
    ours = {name: p.grad for name, p in module.named_parameters() if name in theirs}
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    compared = 0
    for name, gradient in theirs.items():
        mine = ours[name]
        assert mine is not None, name
        own_size = float(gradient.abs().max()) > 1e-3 * largest
        close(mine, gradient, None if own_size else largest)
        compared += own_size
    assert compared > len(theirs) / 2


@pytest.fixture
def golden() -> dict[str, Any]:
    content: dict[str, Any] = torch.load(GOLDEN, weights_only=True)
    return content


@pytest.fixture
def model(golden: dict[str, Any]) -> AutoEncoderKL:
    loss = LPIPSWithDiscriminator(**golden["lossconfig"], perceptual=perceptual)
    loss.discriminator.load_state_dict(golden["discriminator"])
    model = AutoEncoderKL(golden["ddconfig"], golden["embed_dim"], loss)
    model.load_weights(golden["state_dict"])
    return model.train()


@pytest.mark.parametrize("step", [0, 20])
def test_the_autoencoder(step: int, model: AutoEncoderKL, golden: dict[str, Any]) -> None:
    theirs = golden["steps"][step]
    out = model.step(golden["x"], step, "train", noise=golden["noise"])
    out.total.backward()
    close(out.reconstruction, golden["reconstruction"])
    close(out.total, theirs["autoencoder_loss"])
    absent = theirs["autoencoder_log"].keys() - out.log.keys()
    assert absent == (NEEDS_DISCRIMINATOR if step == 0 else set())
    for key in theirs["autoencoder_log"].keys() - absent:
        close(out.log[key], theirs["autoencoder_log"][key])
    gradients_are_close(model, theirs["autoencoder_grads"])
    assert isinstance(model.loss, LPIPSWithDiscriminator)
    assert model.loss.logvar.grad is not None
    close(model.loss.logvar.grad, theirs["logvar_grad"])
    assert all(p.grad is None for p in model.loss.discriminator.parameters())


def test_the_adaptive_weight_that_is_logged_before_it_counts(
    model: AutoEncoderKL, golden: dict[str, Any]
) -> None:
    """The reference computes it at step 0 as well: it is ours as soon as it is asked for."""
    assert isinstance(model.loss, LPIPSWithDiscriminator)
    model.loss.disc_start = 0
    log = model.step(golden["x"], 0, "train", noise=golden["noise"]).log
    for key in NEEDS_DISCRIMINATOR:
        close(log[key], golden["steps"][0]["autoencoder_log"][key])


def test_the_discriminator(model: AutoEncoderKL, golden: dict[str, Any]) -> None:
    loss, theirs = model.loss, golden["steps"][20]
    assert isinstance(loss, LPIPSWithDiscriminator)
    assert not loss.discriminates(0)
    total, log = loss.discriminator_loss(golden["x"], golden["reconstruction"])
    total.backward()  # type: ignore[no-untyped-call]
    close(total, theirs["discriminator_loss"])
    assert log.keys() == theirs["discriminator_log"].keys()
    for key, value in theirs["discriminator_log"].items():
        close(log[key], value)
    gradients_are_close(loss.discriminator, theirs["discriminator_grads"])


def test_a_training_step_gives_both_networks_their_gradients(
    model: AutoEncoderKL, golden: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Lightning-like interface: one scalar, one backward, neither disturbs the other."""
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, **_: forward(x, noise=golden["noise"]))
    model.training_step(golden["x"], 20).backward()  # type: ignore[no-untyped-call]
    theirs = golden["steps"][20]
    gradients_are_close(model, theirs["autoencoder_grads"])
    assert isinstance(model.loss, LPIPSWithDiscriminator)
    gradients_are_close(model.loss.discriminator, theirs["discriminator_grads"])
