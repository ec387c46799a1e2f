"""The same numbers as the original CompVis code, on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae import AutoEncoderKL

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"the reference tensors are not there: {GOLDEN}"
)


@pytest.fixture(params=["vanilla_attention", "linear_attention", "no_attention_avgpool_tanh"])
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(GOLDEN / f"{request.param}.pt", weights_only=True)
    return content


@pytest.fixture
def model(golden: dict[str, Any]) -> AutoEncoderKL:
    model = AutoEncoderKL(golden["ddconfig"], golden["embed_dim"])
    model.load_state_dict(golden["state_dict"])  # strict: their names are ours
    return model.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_moments_and_reconstructions(model: AutoEncoderKL, golden: dict[str, Any]) -> None:
    close(model.encode(golden["x"]).parameters, golden["moments"])
    reconstruction, posterior = model(golden["x"], noise=golden["noise"])
    close(reconstruction, golden["reconstruction"])
    close(posterior.sample(noise=golden["noise"]), golden["z"])
    close(model.decode(golden["z"]), golden["reconstruction"])
    close(model(golden["x"], sample_posterior=False)[0], golden["mode_reconstruction"])


@torch.no_grad()
def test_kl_and_nll(model: AutoEncoderKL, golden: dict[str, Any]) -> None:
    posterior = model.encode(golden["x"])
    close(posterior.kl(), golden["kl"])
    close(posterior.nll(golden["z"]), golden["nll"])


@torch.no_grad()
def test_before_the_discriminator_starts_the_sum_is_the_published_objective() -> None:
    golden = torch.load(GOLDEN / "adversarial_step.pt", weights_only=True)
    log = golden["steps"][0]["autoencoder_log"]
    lossconfig = {
        "target": "elbo",
        "params": {
            "reconstruction": "l1",
            "reduction": "sum",
            "kl_weight": golden["lossconfig"]["kl_weight"],
        },
    }
    model = AutoEncoderKL(golden["ddconfig"], golden["embed_dim"], lossconfig)
    model.load_state_dict(golden["state_dict"], strict=False)
    out = model.step(golden["x"], 0, "train", noise=golden["noise"])
    close(out.reconstruction, golden["reconstruction"])
    close(out.log["train/kl_loss"], log["train/kl_loss"])
    # their reconstruction error holds a perceptual term as well
    pooled = torch.nn.functional.avg_pool2d(golden["x"] - out.reconstruction, 2)
    perceptual = pooled.square().mean((1, 2, 3)).mean()
    close(out.log["train/rec_loss"] + perceptual, log["train/rec_loss"])
    values = golden["x"][0].numel()
    close(out.log["train/nll_loss"] + values * perceptual, log["train/nll_loss"])
    close(out.total + values * perceptual, log["train/total_loss"])
