"""The plain loss by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae import DiagonalGaussianDistribution
from kl_vae.losses import ELBO, default_loss
from tests.messages import mentions

N = 3 * 4 * 4
INPUTS = torch.zeros(2, 3, 4, 4)
RECONSTRUCTIONS = torch.stack((torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), -1.0)))
# two images of 8 latents, each of variance 1 and mean 1 or 0: KL 4 and 0 nats
POSTERIOR = DiagonalGaussianDistribution(
    torch.stack((torch.ones(8, 1, 1), torch.zeros(8, 1, 1))).repeat(1, 2, 1, 1)
    * torch.tensor([1.0] * 8 + [0.0] * 8)[:, None, None]
)
ERROR = {"l1": 0.75, "mse": 0.625}
KL = 2.0


def evaluate(global_step: int = 0, split: str = "train", **params: Any) -> dict[str, float]:
    """The total and the log of ELBO(**params), without the split."""
    total, log = ELBO(**params)(INPUTS, RECONSTRUCTIONS, POSTERIOR, global_step, split=split)
    assert all(key.startswith(f"{split}/") for key in log)
    assert not any(value.requires_grad for value in log.values())
    return {"returned": total.item()} | {k.split("/")[1]: x.item() for k, x in log.items()}


@pytest.mark.parametrize("reconstruction", ["l1", "mse"])
@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1.0), ("sum", N)])
def test_values_by_hand(reconstruction: str, reduction: str, scale: float) -> None:
    figures = evaluate(
        reconstruction=reconstruction, reduction=reduction, kl_weight=0.3, logvar_init=0.7
    )
    error = ERROR[reconstruction]
    nll = error / math.exp(0.7) + 0.7
    assert figures == pytest.approx(
        {
            "returned": scale * (nll + 0.3 * KL / N),
            "total_loss": scale * (nll + 0.3 * KL / N),
            "nll_loss": scale * nll,
            "rec_loss": error,
            "kl_loss": KL,
            "kl_weight": 0.3,
            "logvar": 0.7,
        }
    )


def test_the_split_is_the_prefix_of_the_metrics() -> None:
    assert evaluate(split="val") == evaluate(split="train")


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (1, 0.1), (3, 0.3), (4, 0.4), (99, 0.4)])
def test_the_kl_weight_rises_linearly_from_zero(step: int, weight: float) -> None:
    figures = evaluate(step, kl_weight=0.4, kl_warmup_steps=4)
    assert figures["kl_weight"] == pytest.approx(weight)
    assert figures["total_loss"] == pytest.approx(ERROR["mse"] + weight * KL / N)


def test_without_warmup_the_weight_is_constant() -> None:
    assert evaluate(0, kl_weight=0.4)["kl_weight"] == 0.4


@pytest.mark.parametrize("reconstruction", ["l1", "mse"])
def test_the_optimal_logvar_is_the_log_of_the_error(reconstruction: str) -> None:
    def slope(logvar: float) -> float:
        loss = ELBO(reconstruction, learn_logvar=True, logvar_init=logvar)  # type: ignore[arg-type]
        loss(INPUTS, RECONSTRUCTIONS, POSTERIOR, 0)[0].backward()
        assert loss.logvar.grad is not None
        return loss.logvar.grad.item()

    optimum = math.log(ERROR[reconstruction])
    assert slope(optimum) == pytest.approx(0.0, abs=1e-6)
    assert slope(optimum - 0.1) < -0.05
    assert slope(optimum + 0.1) > 0.05


def test_logvar_is_trained_only_if_asked() -> None:
    assert not ELBO().logvar.requires_grad
    assert ELBO(learn_logvar=True).logvar.requires_grad


@pytest.mark.parametrize("reconstruction", ["l1", "mse"])
def test_gradients_reach_image_and_posterior(reconstruction: str) -> None:
    rec = RECONSTRUCTIONS.clone().requires_grad_()
    moments = POSTERIOR.parameters.clone().requires_grad_()
    loss = ELBO(reconstruction, kl_weight=0.3)  # type: ignore[arg-type]
    loss(INPUTS, rec, DiagonalGaussianDistribution(moments), 0)[0].backward()
    assert rec.grad is not None
    assert moments.grad is not None
    slope = rec.detach().sign() if reconstruction == "l1" else 2.0 * rec.detach()
    torch.testing.assert_close(rec.grad, slope / (2 * N))
    # d KL / d mean = mean
    torch.testing.assert_close(moments.grad[:, :8], 0.3 / N / 2 * moments.detach()[:, :8])


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"reconstruction": "l2"}, ("reconstruction='l2'", "mse, l1")),
        ({"reduction": "none"}, ("reduction='none'", "mean, sum")),
        ({"learn_logvar": "yes"}, ("learn_logvar='yes'", "true", "false")),
        ({"kl_weight": -1.0}, ("kl_weight=-1.0",)),
        ({"kl_weight": "-1e-6"}, ("kl_weight=-1e-06",)),
        ({"kl_weight": None}, ("kl_weight=None",)),
        ({"kl_weight": float("nan")}, ("kl_weight=nan",)),
        ({"kl_warmup_steps": True}, ("kl_warmup_steps=True",)),
        ({"logvar_init": "0"}, ("logvar_init='0'",)),
        ({"logvar_init": None}, ("logvar_init=None",)),
    ],
)
def test_invalid_values_are_named(params: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        ELBO(**params)


def test_half_precision_images_are_compared_in_float32() -> None:
    tiny = torch.full((2, 3, 4, 4), 1e-5, dtype=torch.float16)  # its square is no float16
    total: Tensor = ELBO()(torch.zeros_like(tiny), tiny, POSTERIOR, 0)[1]["train/rec_loss"]
    torch.testing.assert_close(total, tiny.float().square().mean())


def test_default_loss_is_mse_and_half_the_kl() -> None:
    total, log = default_loss(INPUTS, RECONSTRUCTIONS, POSTERIOR, 0, split="val")
    figures = {key: value.item() for key, value in log.items()}
    expected = {"val/total_loss": 0.625 + 0.5 * KL, "val/rec_loss": 0.625, "val/kl_loss": KL}
    assert figures == pytest.approx(expected)
    assert total.item() == pytest.approx(expected["val/total_loss"])
