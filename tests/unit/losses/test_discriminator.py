"""The discriminator's layout, its norms, and the losses on its logits by hand."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from kl_vae.losses.discriminator import (
    DISC_LOSSES,
    DISC_NORMS,
    ActNorm,
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    lecam,
)
from tests.messages import mentions

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "adversarial_step.pt"

# as published, for 3 channels, ndf = 64 and batch norm
LAYOUT: dict[int, dict[str, tuple[int, ...]]] = {
    1: {
        "main.0.weight": (64, 3, 4, 4),
        "main.0.bias": (64,),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.3.bias": (128,),
        "main.3.running_mean": (128,),
        "main.3.running_var": (128,),
        "main.3.num_batches_tracked": (),
        "main.5.weight": (1, 128, 4, 4),
        "main.5.bias": (1,),
    },
    3: {
        "main.0.weight": (64, 3, 4, 4),
        "main.0.bias": (64,),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.3.bias": (128,),
        "main.3.running_mean": (128,),
        "main.3.running_var": (128,),
        "main.3.num_batches_tracked": (),
        "main.5.weight": (256, 128, 4, 4),
        "main.6.weight": (256,),
        "main.6.bias": (256,),
        "main.6.running_mean": (256,),
        "main.6.running_var": (256,),
        "main.6.num_batches_tracked": (),
        "main.8.weight": (512, 256, 4, 4),
        "main.9.weight": (512,),
        "main.9.bias": (512,),
        "main.9.running_mean": (512,),
        "main.9.running_var": (512,),
        "main.9.num_batches_tracked": (),
        "main.11.weight": (1, 512, 4, 4),
        "main.11.bias": (1,),
    },
}
CONVOLUTIONS = {
    "main.0.weight": (4, 3, 4, 4),
    "main.0.bias": (4,),
    "main.2.weight": (8, 4, 4, 4),
    "main.2.bias": (8,),
    "main.5.weight": (1, 8, 4, 4),
    "main.5.bias": (1,),
}
# of n_layers = 1 and ndf = 4, beside the convolutions
NORM_LAYOUT: dict[str, dict[str, tuple[int, ...]]] = {
    "act": {
        "main.3.loc": (1, 8, 1, 1),
        "main.3.scale": (1, 8, 1, 1),
        "main.3.initialized": (),
    },
    "group": {"main.3.weight": (8,), "main.3.bias": (8,)},
    "none": {},
}


def discriminator(**params: Any) -> PatchDiscriminator:
    """A small discriminator with fixed weights."""
    torch.manual_seed(0)
    return PatchDiscriminator(**{"n_layers": 2, "ndf": 8} | params)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


# ---- layout


@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_published_keys_and_shapes(n_layers: int) -> None:
    ours = shapes(PatchDiscriminator(n_layers=n_layers))
    assert list(ours.items()) == list(LAYOUT[n_layers].items())


@pytest.mark.parametrize("norm", NORM_LAYOUT)
def test_the_keys_and_shapes_of_each_other_norm(norm: str) -> None:
    ours = shapes(discriminator(n_layers=1, ndf=4, norm=norm))
    assert ours == CONVOLUTIONS | NORM_LAYOUT[norm]


def test_channels_stop_doubling_at_eight_times_the_first() -> None:
    convolutions = [m for m in discriminator(n_layers=5).main if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [8, 16, 32, 64, 64, 64, 1]
    assert [m.stride[0] for m in convolutions] == [2, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("n_layers", "size", "logits"),
    [(1, (32, 32), (14, 14)), (2, (48, 32), (10, 6)), (3, (256, 256), (30, 30))],
)
def test_the_size_of_the_logits(
    n_layers: int, size: tuple[int, int], logits: tuple[int, int]
) -> None:
    model = discriminator(n_layers=n_layers, in_channels=4, ndf=2)
    assert model(noise(2, 4, *size)).shape == (2, 1, *logits)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
def test_the_minimum_size_gives_one_logit_and_smaller_images_are_rejected(n_layers: int) -> None:
    model = discriminator(n_layers=n_layers, ndf=2)
    size = model.minimum_size
    assert model(noise(1, 3, size, size)).shape == (1, 1, 1, 1)
    for height, width in ((size - 1, size), (size, size - 1)):
        parts = (f"disc_num_layers={n_layers}", f"{height} x {width}", size)
        with pytest.raises(ValueError, match=mentions(*parts)):
            model(noise(1, 3, height, width))
    with pytest.raises(RuntimeError):  # torch's own error without the check
        model.main(noise(1, 3, size - 1, size))


def test_the_published_initial_weights() -> None:
    torch.manual_seed(0)
    layers = list(PatchDiscriminator().main)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert layer.weight.mean().item() == pytest.approx(0.0, abs=1e-3)
            if layer.bias is not None:  # torch's: uniform
                bound = 1.0 / math.sqrt(layer.weight[0].numel())
                assert 0.0 < layer.bias.abs().max() <= bound
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert layer.weight.mean().item() == pytest.approx(1.0, abs=0.01)
            assert not layer.bias.any()


@pytest.mark.parametrize("norm", DISC_NORMS)
def test_every_parameter_and_the_image_receive_gradient(norm: str) -> None:
    model = discriminator(norm=norm)
    images = noise(2, 3, 24, 24).requires_grad_()
    model(images).square().sum().backward()
    assert images.grad is not None
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"the reference tensors are not there: {GOLDEN}")
def test_the_published_code_gives_the_same_step() -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    model = PatchDiscriminator(n_layers=golden["lossconfig"]["disc_num_layers"])
    model.load_state_dict(golden["discriminator"])  # strict
    step = golden["steps"][20]  # after disc_start
    fake = model(golden["reconstruction"])
    g_loss = generator_loss(fake, "hinge")
    torch.testing.assert_close(g_loss, step["autoencoder_log"]["train/g_loss"])
    real, fake = model(golden["x"]), model(golden["reconstruction"])
    log = step["discriminator_log"]
    torch.testing.assert_close(real.mean(), log["train/logits_real"])
    torch.testing.assert_close(fake.mean(), log["train/logits_fake"])
    loss = discriminator_loss(real, fake, "hinge")
    torch.testing.assert_close(loss, log["train/disc_loss"])
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == step["discriminator_grads"].keys()
    for name, theirs in step["discriminator_grads"].items():
        torch.testing.assert_close(gradients[name], theirs, rtol=1e-4, atol=1e-5, msg=name)


# ---- invalid arguments


@pytest.mark.parametrize("value", [0, -1, 1.0, "3", None, True])
@pytest.mark.parametrize(
    ("argument", "key"),
    [("in_channels", "disc_in_channels"), ("n_layers", "disc_num_layers"), ("ndf", "disc_ndf")],
)
def test_invalid_numbers_are_named(argument: str, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=mentions(f"{key}={value!r}", 1)):
        discriminator(**{argument: value})


@pytest.mark.parametrize("norm", ["instance", None])
def test_an_unknown_norm_is_named(norm: Any) -> None:
    parts = (f"disc_norm={norm!r}", "batch, act, group, none")
    with pytest.raises(ValueError, match=mentions(*parts)):
        discriminator(norm=norm)


def test_an_unknown_loss_is_named() -> None:
    error = mentions("disc_loss='wgan'", "hinge, vanilla, non_saturating")
    kind: Any = "wgan"
    with pytest.raises(ValueError, match=error):
        discriminator_loss(noise(2), noise(2), kind)
    with pytest.raises(ValueError, match=error):
        generator_loss(noise(2), kind)


@pytest.mark.parametrize("shape", [(2, 1, 24, 24), (3, 24, 24)])
def test_images_with_other_channels_are_rejected(shape: tuple[int, ...]) -> None:
    error = mentions("disc_in_channels=3", list(shape), "[B, 3, H, W]")
    with pytest.raises(ValueError, match=error):
        discriminator()(noise(*shape))


# ---- norms


def test_batch_norm_uses_running_statistics_in_eval_mode() -> None:
    model = discriminator(norm="batch")
    images = noise(4, 3, 24, 24)
    model(images)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model(images)[:1], model(images[:1]))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    norm = model.main[3]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    norm.running_mean += 1.0
    assert not torch.allclose(model(images), model.train()(images))


@pytest.mark.parametrize("norm", ["group", "none"])
def test_logits_of_an_image_do_not_depend_on_the_batch(norm: str) -> None:
    model = discriminator(norm=norm)
    images = noise(4, 3, 24, 24)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


@pytest.mark.parametrize(
    ("ndf", "groups"), [(64, [32, 32]), (16, [32, 32]), (8, [16, 32]), (9, [18, 18]), (37, [2, 4])]
)
def test_the_groups_are_32_or_the_greatest_divisor_below(ndf: int, groups: list[int]) -> None:
    norms = [m for m in discriminator(ndf=ndf, norm="group").main if isinstance(m, nn.GroupNorm)]
    assert [m.num_groups for m in norms] == groups
    assert all(m.eps == 1e-6 for m in norms)


def test_norm_none_is_an_identity_layer() -> None:
    assert isinstance(discriminator(norm="none").main[3], nn.Identity)


# ---- ActNorm


def test_the_first_training_batch_is_normalized_to_mean_0_and_variance_1() -> None:
    norm = ActNorm(3)
    x = noise(4, 3, 5, 6) * torch.tensor([0.5, 2.0, 7.0])[:, None, None] + 3.0
    out = norm(x)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-5)
    # to the letter
    torch.testing.assert_close(norm.loc.flatten(), -x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.scale.flatten(), 1.0 / (x.std((0, 2, 3)) + 1e-6))
    assert norm.initialized.item() == 1
    assert norm.initialized.dtype == torch.uint8


def test_a_channel_without_variance_is_scaled_by_a_million() -> None:
    norm = ActNorm(1)
    assert norm(torch.full((2, 1, 3, 3), 0.25)).abs().max() == 0.0
    assert norm.scale.item() == pytest.approx(1e6)


def test_later_batches_change_nothing() -> None:
    norm = ActNorm(3)
    norm(noise(4, 3, 5, 5))
    before = copy.deepcopy(norm.state_dict())
    x = 9.0 * noise(4, 3, 5, 5, seed=2)
    torch.testing.assert_close(norm(x), before["scale"] * (x + before["loc"]))
    torch.testing.assert_close(dict(norm.state_dict()), dict(before), rtol=0, atol=0)


def test_in_eval_mode_the_first_batch_passes_unchanged() -> None:
    norm = ActNorm(3).eval()
    x = noise(4, 3, 5, 5)
    assert torch.equal(norm(x), x)
    assert norm.initialized.item() == 0


def test_a_loaded_norm_is_initialized() -> None:
    norm, resumed = ActNorm(3), ActNorm(3)
    norm(noise(4, 3, 5, 5))
    resumed.load_state_dict(norm.state_dict())
    x = 9.0 * noise(4, 3, 5, 5, seed=2)
    assert torch.equal(resumed(x), norm(x))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_fresh_state_resets_the_initialization(assign: bool) -> None:
    model = nn.Sequential(ActNorm(3))
    fresh = copy.deepcopy(model.state_dict())
    model(noise(4, 3, 5, 5))
    model.load_state_dict(fresh, assign=assign)
    out = model(9.0 * noise(4, 3, 5, 5, seed=2))
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-5)


def test_a_copy_keeps_its_own_state() -> None:
    norm = ActNorm(3)
    copied = copy.deepcopy(norm)
    norm(noise(4, 3, 5, 5))
    assert copied.initialized.item() == 0
    copied.load_state_dict(norm.state_dict())
    x = 9.0 * noise(4, 3, 5, 5, seed=2)
    assert torch.equal(copied(x), norm(x))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_first_batch_that_is_not_finite_does_not_initialize(value: float) -> None:
    norm = ActNorm(3)
    x = noise(4, 3, 5, 5)
    bad = x.clone()
    bad[0, 1, 2, 2] = value  # the square of 1e30 is no float32
    norm(bad)
    assert norm.initialized.item() == 0
    assert not norm.loc.any()
    assert (norm.scale == 1.0).all()
    out = norm(x)
    assert norm.initialized.item() == 1
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-5)


def test_one_value_per_channel_does_not_initialize() -> None:
    norm = ActNorm(3)
    norm(noise(1, 3, 1, 1))
    assert norm.initialized.item() == 0


def test_after_the_first_batch_the_buffer_is_not_read() -> None:
    norm = ActNorm(3)
    norm(noise(4, 3, 5, 5))
    norm.initialized = torch.tensor(1, dtype=torch.uint8, device="meta")  # reading it would raise
    assert norm(noise(4, 3, 5, 5)).isfinite().all()


def test_frozen_parameters_are_initialized() -> None:
    norm, other = ActNorm(3), ActNorm(3)
    frozen = {key: parameter.detach() for key, parameter in norm.named_parameters()}
    x = noise(4, 3, 5, 5)
    assert torch.equal(functional_call(norm, frozen, (x,)), other(x))
    torch.testing.assert_close(dict(norm.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_half_precision_is_measured_in_float32() -> None:
    norm = ActNorm(1)
    norm(torch.full((1, 1, 300, 300), 2.0, dtype=torch.float16))  # their sum is no float16
    assert norm.loc.item() == -2.0


def test_a_process_group_of_one_changes_nothing(tmp_path: Path) -> None:
    alone, grouped = ActNorm(3), ActNorm(3)
    x = noise(4, 3, 5, 5)
    dist.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        out = grouped(x)
    finally:
        dist.destroy_process_group()
    assert torch.equal(out, alone(x))


# ---- losses

REAL = torch.tensor([2.0, 0.5, -1.0])
FAKE = torch.tensor([-3.0, 0.0, 1.5])


def softplus(*values: float) -> float:
    """The mean of log(1 + e^x)."""
    return sum(math.log1p(math.exp(x)) for x in values) / len(values)


CROSS_ENTROPY = 0.5 * (softplus(-2.0, -0.5, 1.0) + softplus(-3.0, 0.0, 1.5))


@pytest.mark.parametrize(
    ("kind", "discriminates", "generates"),
    [
        # relu(1 - real): 0, 0.5, 2; relu(1 + fake): 0, 1, 2.5
        ("hinge", 0.5 * (2.5 / 3 + 3.5 / 3), 0.5),
        ("vanilla", CROSS_ENTROPY, 0.5),
        ("non_saturating", CROSS_ENTROPY, softplus(3.0, 0.0, -1.5)),
    ],
)
def test_losses_by_hand(kind: Any, discriminates: float, generates: float) -> None:
    assert discriminator_loss(REAL, FAKE, kind).item() == pytest.approx(discriminates)
    assert generator_loss(FAKE, kind).item() == pytest.approx(generates)


def test_lecam_by_hand() -> None:
    # relu(real - 0.25): 1.75, 0.25, 0; relu(1 - fake): 4, 1, 0
    expected = (1.75**2 + 0.25**2) / 3 + (16.0 + 1.0) / 3
    assert lecam(REAL, FAKE, 1.0, 0.25).item() == pytest.approx(expected)
    averages = torch.tensor(1.0), torch.tensor(0.25)
    assert lecam(REAL, FAKE, *averages).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", DISC_LOSSES)
def test_gradients_of_the_losses_have_the_right_sign(kind: Any) -> None:
    real, fake = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    discriminator_loss(real, fake, kind).backward()  # type: ignore[no-untyped-call]
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad < 0.0).all()
    assert (fake.grad > 0.0).all()
    fake.grad = None
    generator_loss(fake, kind).backward()  # type: ignore[no-untyped-call]
    assert fake.grad is not None
    assert (fake.grad < 0.0).all()


@pytest.mark.parametrize("kind", DISC_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32(kind: Any, dtype: torch.dtype) -> None:
    # unequal numbers of logits, of which float16 cannot hold the sum
    real, fake = torch.full((1000,), 512.0, dtype=dtype), torch.full((500,), 512.0, dtype=dtype)
    for loss in (discriminator_loss(real, fake, kind), generator_loss(fake, kind)):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    assert lecam(real, fake, 0.0, 0.0).dtype == torch.float32
    assert lecam(real, fake, 0.0, 0.0).item() == 512.0**2
