"""The LPIPS + GAN loss: its values, its forward and backward passes, its gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae import AutoEncoderKL, DiagonalGaussianDistribution
from kl_vae.losses import ELBO, LPIPSWithDiscriminator
from kl_vae.losses.adversarial import KnownGradient
from kl_vae.losses.discriminator import RealAndFake
from tests.messages import mentions


class Perceptual(nn.Module):
    """A network that counts its forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.forwards, self.backwards = [0, 0], 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.network(x)
        self.forwards[0] += 1
        features = self.network(y)
        self.forwards[1] += 1
        if features.requires_grad:
            features.register_hook(self._count)
        return (target - features).square().mean((1, 2, 3), keepdim=True)

    def _count(self, _: Tensor) -> None:
        self.backwards += 1


def build(**params: Any) -> LPIPSWithDiscriminator:
    torch.manual_seed(1)
    defaults: dict[str, Any] = {"disc_start": 10, "disc_num_layers": 1, "disc_ndf": 8}
    defaults |= {"kl_weight": 1e-3, "disc_weight": 0.5, "disc_norm": "group"}
    return LPIPSWithDiscriminator(**{"perceptual": Perceptual(), **defaults, **params})


def with_loss(ddconfig: dict[str, Any], **params: Any) -> AutoEncoderKL:
    loss = build(**params)
    torch.manual_seed(0)
    return AutoEncoderKL(ddconfig, 3, loss)


def loss_of(model: AutoEncoderKL) -> LPIPSWithDiscriminator:
    assert isinstance(model.loss, LPIPSWithDiscriminator)
    return model.loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def noise() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def test_known_gradients_do_not_depend_on_the_value() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    value = torch.tensor(7.0)
    total = KnownGradient.apply(value, x, torch.tensor([1.0, 2.0]), y, torch.tensor(3.0))
    (2.0 * total).backward()
    assert total.item() == 7.0
    assert x.grad is not None and x.grad.tolist() == [2.0, 4.0]
    assert y.grad is not None and y.grad.item() == 6.0


def test_gradients_match_those_of_the_whole_graph(
    tiny_ddconfig: dict[str, Any], images: Tensor
) -> None:
    """nll + kl_weight * KL + weight * adversarial, written out and differentiated in one piece."""
    model = with_loss(tiny_ddconfig, logvar_init=0.3)
    loss = loss_of(model)
    out = model.step(images, 10, "train", noise=noise())
    out.total.backward()
    cut = gradients(model)
    model.zero_grad()

    reconstruction, posterior = model(images, noise=noise())
    values = images[0].numel()
    perceptual = loss.perceptual_loss(images, reconstruction).mean()  # type: ignore[misc]
    rec = (images - reconstruction).abs().mean() + perceptual
    nll = values * (rec / loss.logvar.exp() + loss.logvar)
    adversarial = -loss.discriminator(reconstruction).mean()
    last = model.get_last_layer()
    a, b = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (nll, adversarial))
    weight = 0.5 * (a / (b + 1e-4)).clamp(0, 1e4).detach()
    total = nll + 1e-3 * posterior.kl().mean() + weight * adversarial
    total.backward()

    assert torch.allclose(out.total, total, rtol=1e-5)
    assert torch.allclose(out.log["train/d_weight"], weight, rtol=1e-5)
    whole = gradients(model)
    assert cut.keys() == {key for key in whole if "discriminator" not in key}
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for key, gradient in cut.items():
        assert float((gradient - whole[key]).abs().max()) <= 1e-5 * largest, key


def test_a_gan_step_runs_each_network_once(tiny_ddconfig: dict[str, Any], images: Tensor) -> None:
    model = with_loss(tiny_ddconfig)
    perceptual = loss_of(model).perceptual_loss
    assert isinstance(perceptual, Perceptual)
    passes = {"encoder": 0, "decoder": 0, "discriminator": 0}
    modules = {"encoder": model.encoder, "decoder": model.decoder}
    for name, module in {**modules, "discriminator": loss_of(model).discriminator}.items():
        module.register_forward_hook(
            lambda *_, name=name: passes.__setitem__(name, passes[name] + 1)
        )
    model.training_step(images, 9).backward()  # type: ignore[no-untyped-call]
    assert passes == {"encoder": 1, "decoder": 1, "discriminator": 0}
    assert (perceptual.forwards, perceptual.backwards) == ([1, 1], 1)
    model.training_step(images, 10).backward()  # type: ignore[no-untyped-call]
    # the discriminator: once for the autoencoder, once each for real and fake images
    assert passes == {"encoder": 2, "decoder": 2, "discriminator": 3}
    assert (perceptual.forwards, perceptual.backwards) == ([2, 2], 2)


def test_warmup_trains_the_discriminator_before_its_term_is_added(
    tiny_ddconfig: dict[str, Any], images: Tensor
) -> None:
    loss = build(disc_warmup_steps=5)
    assert [loss.discriminates(step) for step in (9, 10, 15)] == [False, True, True]
    assert [loss.counts(step) for step in (9, 10, 14, 15)] == [False, False, False, True]
    model = with_loss(tiny_ddconfig, disc_warmup_steps=5)
    model.training_step(images, 12).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in loss_of(model).discriminator.parameters())
    assert model.step(images, 12, "train").log["train/disc_factor"] == 0


def test_perceptual_start(tiny_ddconfig: dict[str, Any], images: Tensor) -> None:
    model = with_loss(tiny_ddconfig, perceptual_start=5)
    perceptual = loss_of(model).perceptual_loss
    assert isinstance(perceptual, Perceptual)
    before = model.step(images, 4, "train", noise=noise())
    assert "train/p_loss" not in before.log and perceptual.forwards == [0, 0]
    after = model.step(images, 5, "train", noise=noise())
    difference = after.log["train/rec_loss"] - before.log["train/rec_loss"]
    assert torch.allclose(difference, after.log["train/p_loss"], rtol=1e-4)
    with torch.no_grad():  # validation means the same at any step
        assert model.step(images, 4, "val").log.keys() == model.step(images, 5, "val").log.keys()


@pytest.mark.parametrize("off", [{"disc_factor": 0.0}, {"disc_weight": 0.0}])
def test_weight_zero_disables_the_adversarial_term(off: dict[str, float]) -> None:
    loss = build(**off)
    assert not loss.counts(10**6)
    assert loss.discriminates(10**6) == ("disc_factor" not in off)


def test_fixed_weighting(tiny_ddconfig: dict[str, Any], images: Tensor) -> None:
    model = with_loss(tiny_ddconfig, disc_weighting="fixed", disc_factor=2.0)
    out = model.step(images, 10, "train", noise=noise())
    before = model.step(images, 9, "train", noise=noise())
    assert out.log["train/d_weight"] == 0.5
    expected = before.total + 0.5 * 2.0 * out.log["train/g_loss"]
    assert torch.allclose(out.total, expected, rtol=1e-6)


def test_mean_reduction_divides_everything_by_the_number_of_values(
    tiny_ddconfig: dict[str, Any], images: Tensor
) -> None:
    totals, norms = {}, {}
    for reduction in ("sum", "mean"):
        model = with_loss(tiny_ddconfig, reduction=reduction)
        out = model.step(images, 9, "train", noise=noise())
        out.total.backward()
        totals[reduction] = out.total.item()
        norms[reduction] = model.get_last_layer().grad.norm().item()  # type: ignore[union-attr]
    assert totals["sum"] == pytest.approx(totals["mean"] * 3 * 16 * 16, rel=1e-5)
    assert norms["sum"] == pytest.approx(norms["mean"] * 3 * 16 * 16, rel=1e-5)


def test_without_perceptual_and_discriminator_it_is_the_elbo(images: Tensor) -> None:
    posterior = DiagonalGaussianDistribution(torch.randn(2, 6, 8, 8))
    reconstructions = (0.5 * images).requires_grad_()
    params: dict[str, Any] = {"reconstruction": "mse", "kl_weight": 1e-2, "logvar_init": 0.1}
    elbo, _ = ELBO(**params, reduction="sum")(images, reconstructions, posterior, 0)
    ours, log = build(**params, perceptual_weight=0.0)(images, reconstructions, posterior, 0)
    assert torch.allclose(ours, elbo)
    assert "train/p_loss" not in log


def test_pixelloss_weight(images: Tensor) -> None:
    posterior = DiagonalGaussianDistribution(torch.zeros(2, 6, 8, 8))
    for weight in (1.0, 3.0):
        _, log = build(pixelloss_weight=weight)(images, 0.5 * images, posterior, 0)
        pixels = log["train/rec_loss"] - log["train/p_loss"]
        assert torch.allclose(pixels, weight * (0.5 * images).abs().mean(), rtol=1e-5)


@torch.no_grad()
def test_validation_does_not_depend_on_disc_start(
    tiny_ddconfig: dict[str, Any], images: Tensor
) -> None:
    model = with_loss(tiny_ddconfig).eval()
    before, after = (model.step(images, step, "val", noise=noise()) for step in (0, 20))
    assert before.log == after.log
    assert before.log.keys() == {
        f"val/{key}"
        for key in ("total_loss", "nll_loss", "rec_loss", "p_loss", "kl_loss", "logvar")
    }


def test_a_learned_logvar_is_trained_and_a_fixed_one_is_not(
    tiny_ddconfig: dict[str, Any], images: Tensor
) -> None:
    for learned in (True, False):
        model = with_loss(tiny_ddconfig, learn_logvar=learned)
        model.step(images, 10, "train").total.backward()
        logvar = loss_of(model).logvar
        assert (logvar.grad is not None) == learned
        assert any(p is logvar for p in model.own_parameters()) == learned


def test_the_discriminator_has_an_optimiser_of_its_own(tiny_ddconfig: dict[str, Any]) -> None:
    model = with_loss(tiny_ddconfig)
    optimizers = model.configure_optimizers()
    assert isinstance(optimizers, list)
    of_autoencoder, of_discriminator = (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in optimizers
    )
    ids = {id(p) for p in loss_of(model).discriminator.parameters()}
    assert of_discriminator == ids
    assert of_autoencoder == {id(p) for p in model.parameters()} - ids - {
        id(p)
        for p in loss_of(model).perceptual_loss.parameters()  # type: ignore[union-attr]
    }
    assert optimizers[1].param_groups[0]["betas"] == (0.5, 0.9)


def test_a_conditional_discriminator_sees_the_condition(images: Tensor) -> None:
    loss = build(disc_conditional=True, disc_in_channels=5)
    cond = torch.zeros(2, 2, 16, 16)
    total, log = loss.discriminator_loss(images, images, cond)
    assert total.isfinite() and log["train/logits_real"].isfinite()
    posterior = DiagonalGaussianDistribution(torch.zeros(2, 6, 8, 8))
    last = torch.ones((), requires_grad=True)
    total, _ = loss(images, images * last, posterior, 10, last_layer=last, cond=cond)
    assert total.isfinite()
    with pytest.raises(ValueError, match=mentions("disc_conditional=True", "cond", "[B, C, H, W]")):
        loss.discriminator_loss(images, images)


def test_lecam_regularizes_the_logits_towards_their_averages(images: Tensor) -> None:
    loss = build(lecam_weight=2.0, lecam_decay=0.9)
    plain, _ = build().discriminator_loss(images, -images)
    total, log = loss.discriminator_loss(images, -images)
    real, fake = RealAndFake(loss.discriminator)(images, -images)
    expected = real.relu().square().mean() + (-fake).relu().square().mean()  # averages are 0 yet
    assert torch.allclose(log["train/lecam"], expected)
    assert torch.allclose(total, plain + 2.0 * expected)
    loss.note_logits(torch.stack(loss.logits_to_note(log)))
    expected = 0.1 * torch.stack([real.mean(), fake.mean()])
    assert torch.allclose(loss.logits_average, expected)
    assert "logits_average" in loss.state_dict() and "logits_average" not in build().state_dict()


def test_the_adaptive_weight_needs_a_trainable_last_layer(
    tiny_ddconfig: dict[str, Any], images: Tensor
) -> None:
    model = with_loss(tiny_ddconfig)
    model.get_last_layer().requires_grad_(False)
    with pytest.raises(
        ValueError, match=mentions("disc_weighting=global", "disc_weighting: fixed")
    ):
        model.step(images, 10, "train")
    model.step(images, 9, "train")


def test_nan_is_propagated(tiny_ddconfig: dict[str, Any], images: Tensor) -> None:
    model = with_loss(tiny_ddconfig)
    with torch.no_grad():
        model.get_last_layer().fill_(math.nan)
    out = model.step(images, 10, "train")
    assert out.total.isnan() and out.log["train/d_weight"].isnan()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_weight(
    tiny_ddconfig: dict[str, Any], images: Tensor, precision: torch.dtype
) -> None:
    """At gradients of 1e-7, which fp16 would round to 0."""
    weights = []
    for enabled in (False, True):
        model = with_loss(tiny_ddconfig, reduction="mean", pixelloss_weight=1e-2)
        with torch.autocast("cpu", precision, enabled=enabled):
            out = model.step(images, 10, "train", noise=noise())
        assert out.total.dtype == torch.float32
        weights.append(out.log["train/d_weight"].item())
    assert weights[1] == pytest.approx(weights[0], rel=0.1)


def test_the_loss_has_nothing_but_discriminator_and_logvar_to_save() -> None:
    from kl_vae.losses.lpips import LPIPS

    assert build(perceptual_weight=0.0).perceptual_loss is not None  # a module is used as given
    loss = LPIPSWithDiscriminator(0, perceptual_weight=0.0)
    assert loss.perceptual_loss is None
    assert all(key.startswith(("logvar", "discriminator.main.")) for key in loss.state_dict())
    assert not any(isinstance(module, LPIPS) for module in loss.modules())


def test_published_parameter_names() -> None:
    loss = LPIPSWithDiscriminator(5, regularization_weights={"kl_loss": 0.25}, perceptual_weight=0)
    assert loss.kl_weight == 0.25
    act = LPIPSWithDiscriminator(5, use_actnorm=True, perceptual_weight=0)
    assert "discriminator.main.3.loc" in act.state_dict()
    # by position, in the published order
    loss = LPIPSWithDiscriminator(5, 0.1, 0.2, 0.3, 2, 3, 0.4, 0.5, 0.0, False, False, "vanilla")
    assert (loss.kl_weight, loss.disc_factor, loss.disc_weight) == (0.2, 0.4, 0.5)
    assert (loss.discriminator.n_layers, loss.disc_loss) == (2, "vanilla")


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"disc_start": -1}, ("disc_start=-1", 0)),
        ({"disc_start": 1.5}, ("disc_start=1.5",)),
        ({"perceptual_start": None}, ("perceptual_start=None",)),
        ({"disc_warmup_steps": "9"}, ("disc_warmup_steps='9'",)),
        ({"kl_weight": "-1e-6"}, ("kl_weight=-1e-06",)),
        ({"disc_weight": -0.5}, ("disc_weight=-0.5",)),
        ({"logvar_init": math.inf}, ("logvar_init=inf",)),
        ({"lecam_decay": None}, ("lecam_decay=None",)),
        ({"disc_loss": "wgan"}, ("disc_loss='wgan'", "hinge, vanilla, non_saturating")),
        ({"disc_weighting": "none"}, ("disc_weighting='none'", "global, rank, fixed")),
        ({"disc_norm": "layer"}, ("disc_norm='layer'", "batch, act, group, none")),
        ({"disc_num_layers": 0}, ("disc_num_layers=0", 1)),
        ({"use_actnorm": True}, ("disc_norm=group", "use_actnorm", "act")),
        ({"use_actnorm": "no"}, ("use_actnorm='no'", "true", "false")),
        ({"reconstruction": "huber"}, ("reconstruction='huber'", "l1, mse")),
        ({"reduction": "none"}, ("reduction='none'", "sum, mean")),
        ({"perceptual": "resnet"}, ("perceptual='resnet'", "vgg, alex, squeeze")),
        ({"perceptual_heads": 3}, ("perceptual_heads=3", "path")),
        ({"regularization_weights": {"l2": 1}}, ("regularization_weights.l2=1", "kl_loss")),
        ({"regularization_weights": {"kl_loss": "x"}}, ("regularization_weights.kl_loss='x'",)),
    ],
)
def test_invalid_values_are_named(params: dict[str, Any], parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        build(**params)
