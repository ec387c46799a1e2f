"""The perceptual distance: its gradient, its constants, and invalid images."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from kl_vae.losses.lpips import LPIPS
from tests.messages import mentions

ARCHITECTURES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}
CHANNELS = {
    "vgg": (64, 128, 256, 512, 512),
    "alex": (64, 192, 384, 256, 256),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}
SMALLEST = {"vgg": 16, "alex": 31, "squeeze": 17}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Files of random weights for a network, as the keywords `features` and `heads`."""
    folder = tmp_path_factory.mktemp("weights")

    def write(net: str) -> dict[str, Any]:
        paths = {key: folder / f"{net}_{key}.pth" for key in ("features", "heads")}
        if not paths["heads"].exists():
            torch.manual_seed(0)
            with torch.device("meta"):
                shapes = torchvision.models.get_model(ARCHITECTURES[net]).features.state_dict()
            features = {
                key: torch.randn(x.shape) * math.sqrt(2 / x[0].numel())  # He et al. 2015
                if x.dim() == 4
                else torch.randn(x.shape) * 0.1
                for key, x in shapes.items()
            }
            torch.save(features, paths["features"])
            heads = {
                f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1)
                for i, c in enumerate(CHANNELS[net])
            }
            torch.save(heads, paths["heads"])
        return paths

    return write


@pytest.fixture(scope="module")
def squeeze(files: Callable[[str], dict[str, Any]]) -> LPIPS:
    return LPIPS("squeeze", **files("squeeze"))


def pair(channels: int = 3, side: int = 32) -> tuple[Tensor, Tensor]:
    """Two batches [2, channels, side, side] in [-1, 1]."""
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.rand(2, channels, side, side, generator=generator) - 1
    noise = torch.randn(x.shape, generator=generator)
    return x, (x + 0.1 * noise).clamp(-1, 1)


def test_one_distance_per_image_which_is_zero_for_identical_images(squeeze: LPIPS) -> None:
    x, y = pair()
    y[1] = x[1]
    distances = squeeze(x, y)
    assert distances.shape == (2, 1, 1, 1)
    assert distances[0] > 0
    assert distances[1] == 0


def test_the_distance_is_symmetric_and_grows_with_the_noise(squeeze: LPIPS) -> None:
    x, y = pair()
    torch.testing.assert_close(squeeze(x, y), squeeze(y, x))
    assert (squeeze(x, x + 0.2 * (y - x)) < squeeze(x, y)).all()


def test_a_head_weights_its_channels(
    files: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    paths = files("squeeze")
    plain = LPIPS("squeeze", linear=False, features=paths["features"])
    heads = torch.load(paths["heads"], weights_only=True)
    torch.save({key: torch.full_like(x, 3.0) for key, x in heads.items()}, tmp_path / "heads.pth")
    threes = LPIPS("squeeze", features=paths["features"], heads=tmp_path / "heads.pth")
    torch.testing.assert_close(threes(*pair()), 3 * plain(*pair()))


def test_without_linear_heads_none_are_read(files: Callable[[str], dict[str, Any]]) -> None:
    features = files("squeeze")["features"]
    LPIPS("squeeze", linear=False, features=features, heads="nowhere/heads.pth")


def test_only_reconstructions_get_a_gradient(squeeze: LPIPS) -> None:
    x, y = (images.requires_grad_() for images in pair())
    squeeze(x, y).sum().backward()
    assert x.grad is None
    assert y.grad is not None
    assert y.grad.isfinite().all()
    assert (y.grad.flatten(1).norm(dim=1) > 0).all()


def test_only_the_reconstructions_build_a_graph(
    squeeze: LPIPS,
) -> None:
    squeeze = copy.deepcopy(squeeze)  # the hooks stay with the copy
    graphs: list[bool] = []
    backwards: list[str] = []

    def after_forward(module: nn.Module, arguments: Any, output: Tensor) -> None:
        graphs.append(output.requires_grad)
        if output.requires_grad:
            output.register_hook(lambda gradient: backwards.append("first layer"))

    squeeze.features[0].register_forward_hook(after_forward)
    x, y = (images.requires_grad_() for images in pair())
    squeeze(x, y).sum().backward()
    assert graphs == [False, True]
    assert backwards == ["first layer"]


def test_a_gradient_step_reduces_the_distance(squeeze: LPIPS) -> None:
    x, y = pair()
    y.requires_grad_()
    before = squeeze(x, y).sum()
    (gradient,) = torch.autograd.grad(before, y)
    step = 0.01 * before.item() / gradient.square().sum().item()
    change = squeeze(x, y.detach() - step * gradient).sum().item() - before.item()
    assert change == pytest.approx(-0.01 * before.item(), rel=0.2)


def test_the_gradient_at_identical_images_is_zero(squeeze: LPIPS) -> None:
    x, _ = pair()
    y = x.clone().requires_grad_()
    squeeze(x, y).sum().backward()
    assert y.grad is not None
    assert (y.grad == 0).all()


def test_the_gradient_is_finite_where_all_features_are_zero(
    files: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    paths = files("squeeze")
    features = torch.load(paths["features"], weights_only=True)
    features["0.weight"] = features["0.weight"].abs()  # dark images: nothing passes the first relu
    features["0.bias"] = torch.zeros_like(features["0.bias"])
    torch.save(features, tmp_path / "features.pth")
    lpips = LPIPS("squeeze", features=tmp_path / "features.pth", heads=paths["heads"])
    x, y = pair()
    y[..., :16] = -1.0
    y.requires_grad_()
    assert (lpips.features[:2]((y - lpips.shift) / lpips.scale).sum(dim=1) == 0).any()
    lpips(x, y).sum().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()
    assert (y.grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_under_autocast(squeeze: LPIPS, dtype: torch.dtype) -> None:
    x, y = (images.to(dtype) for images in pair())
    expected = squeeze(x.float(), y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = squeeze(x, y)
    assert distances.dtype == torch.float32
    assert torch.equal(distances, expected)


def test_grey_images_are_repeated_to_three_channels(squeeze: LPIPS) -> None:
    x, y = pair(channels=1)
    expected = squeeze(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1))
    torch.testing.assert_close(squeeze(x, y), expected)


def test_weights_are_neither_trained_nor_saved(squeeze: LPIPS) -> None:
    holder = nn.ModuleDict({"perceptual": squeeze})
    assert not list(holder.parameters())
    assert not holder.state_dict()
    holder.load_state_dict({})
    assert not any(x.requires_grad or x.is_meta for x in squeeze.buffers())


def test_all_buffers_move_with_to(squeeze: LPIPS) -> None:
    # weights and biases of 25 convolutions; 7 heads; shift and scale
    moved = copy.deepcopy(squeeze).to("meta")
    assert len(list(moved.buffers())) == 2 * 25 + 7 + 2
    assert all(x.is_meta for x in moved.buffers())


def test_it_stays_in_eval_mode(squeeze: LPIPS) -> None:
    holder = nn.ModuleDict({"perceptual": squeeze}).train()
    assert holder.training
    assert not any(module.training for module in squeeze.modules())


def test_construction_draws_no_random_numbers(files: Callable[[str], dict[str, Any]]) -> None:
    paths = files("squeeze")
    before = torch.get_rng_state()
    LPIPS("squeeze", **paths)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_the_smallest_image(net: str, files: Callable[[str], dict[str, Any]]) -> None:
    lpips = LPIPS(net, **files(net))
    side = SMALLEST[net]
    assert (lpips(*pair(side=side)) > 0).all()
    small = torch.zeros(1, 3, side + 8, side - 1)
    sizes = (f"{side + 8} x {side - 1}", f"{side} x {side}")
    error = mentions("LPIPS", net, *sizes, "perceptual_weight: 0")
    with pytest.raises(ValueError, match=error):
        lpips(small, small)
    with pytest.raises(RuntimeError, match="Output size is too small"):  # the bound is tight
        lpips.features(small)


@pytest.mark.parametrize(
    ("inputs", "reconstructions", "parts"),
    [
        ((2, 3, 32, 32), (2, 3, 32, 31), ("(2, 3, 32, 32)", "(2, 3, 32, 31)")),
        ((3, 32, 32), (3, 32, 32), ("(3, 32, 32)", "[B, C, H, W]")),
        ((2, 4, 32, 32), (2, 4, 32, 32), (4, 1, 3, "channels", "perceptual_weight: 0")),
    ],
)
def test_invalid_images_are_named(
    squeeze: LPIPS,
    inputs: tuple[int, ...],
    reconstructions: tuple[int, ...],
    parts: tuple[object, ...],
) -> None:
    with pytest.raises(ValueError, match=mentions("LPIPS", *parts)):
        squeeze(torch.zeros(inputs), torch.zeros(reconstructions))


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"net": "resnet"}, ("net='resnet'", "vgg, alex, squeeze")),
        ({"linear": "no"}, ("linear='no'", "True", "False")),
    ],
)
def test_invalid_values_are_named(params: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        LPIPS(**params)
