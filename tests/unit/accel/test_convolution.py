"""Modules that convolve by Winograd's algorithm, and their gradients."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.checkpointing import norm_silu_conv
from kl_vae.accel.convolution import WinogradConv2d, convolve, suits


def test_where_it_suits() -> None:
    x, conv = torch.zeros(1, 64, 32, 32), nn.Conv2d(64, 64, 3, padding=1)
    assert not suits(conv, x)  # gradients may be kept
    with torch.inference_mode():
        assert suits(conv, x)
        assert not suits(copy.deepcopy(conv).bfloat16(), x.bfloat16())
        assert not suits(copy.deepcopy(conv).double(), x.double())
        assert not suits(conv, x[:, :, :8, :8])
        assert not suits(nn.Conv2d(64, 3, 3, padding=1), x)
        assert not suits(copy.deepcopy(conv).to("meta"), x)
        assert not suits(conv, x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not suits(conv, x)


def test_a_module_notices_new_weights_and_falls_back_where_it_must() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 64, 3, padding=1)
    conv = copy.deepcopy(plain)
    conv.__class__ = WinogradConv2d
    x = torch.randn(1, 64, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), plain(x))
    assert torch.equal(copy.deepcopy(conv).double()(x.double()), plain.double()(x.double()))
    plain.float()
    with torch.no_grad():
        assert not torch.equal(conv(x), plain(x))
        for change in (lambda w: w.mul_(2.0), lambda w: w.add_(0.1)):
            torch.testing.assert_close(conv(x), plain(x), rtol=1e-4, atol=1e-4)
            for module in (plain, conv):
                change(module.weight.data)  # of which its version does not tell
        torch.testing.assert_close(conv(x), plain(x), rtol=1e-4, atol=1e-4)


def test_it_can_be_copied_and_pickled() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1)
    conv.__class__ = WinogradConv2d
    x = torch.randn(1, 64, 32, 32)
    with torch.no_grad():
        for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
            assert type(other) is WinogradConv2d
            assert torch.equal(other(x), conv(x))


def pair(channels: int = 64, out_channels: int = 80, bias: bool = True) -> tuple[nn.Conv2d, ...]:
    """A plain convolution, and the same by Winograd's algorithm."""
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, out_channels, 3, padding=1, bias=bias)
    other = copy.deepcopy(plain)
    other.__class__ = WinogradConv2d
    return plain, other


def gradients(conv: nn.Conv2d, x: Tensor, weights: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    conv.zero_grad()
    (conv(x) * weights).sum().backward()
    return [x.grad, *(p.grad for p in conv.parameters())]


def assert_close(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """To 1e-5 of the norm."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm() < 1e-5 * other.norm()


# the last has too few positions for the output and the input's gradient, but not for the weight's
@pytest.mark.parametrize("height, width", [(24, 24), (23, 30), (8, 16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_a_convolution(
    height: int, width: int, bias: bool, layout: Any
) -> None:
    plain, conv = pair(bias=bias)
    x = torch.randn(1, 64, height, width).contiguous(memory_format=layout)
    weights = torch.randn(1, 80, height, width).contiguous(memory_format=layout)
    found = gradients(conv, x, weights)
    assert_close(found, gradients(plain, x, weights))
    weight_gradient = found[1]
    assert weight_gradient is not None
    assert weight_gradient.stride() == conv.weight.stride()  # or a fused AdamW would mix them up


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    for conv in pair():
        x = torch.randn(1, 64, 24, 24, requires_grad=True)
        tensors = {"x": x, "weight": conv.weight, "bias": conv.bias}
        tensors[frozen].requires_grad_(False)
        conv(x).sum().backward()
        assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


def test_gradients_of_gradients_are_those_of_a_convolution() -> None:
    results = []
    for conv in pair():
        torch.manual_seed(1)
        x = torch.randn(1, 64, 24, 24, requires_grad=True)
        (first,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, conv.weight, conv.bias]))
    assert_close(*[list(result) for result in results])


def test_functional_transforms_take_the_gradient() -> None:
    results = []
    for conv in pair():
        weights = dict(conv.named_parameters())

        def loss(weights: dict[str, Tensor], x: Tensor, conv: nn.Conv2d = conv) -> Tensor:
            return torch.func.functional_call(conv, weights, (x,)).square().sum()

        torch.manual_seed(1)
        results.append(torch.func.grad(loss)(weights, torch.randn(1, 64, 24, 24)))
    assert_close(*[list(result.values()) for result in results])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("side", [24, 12])
def test_norm_silu_and_convolution_in_one(with_residual: bool, side: int) -> None:
    norm = nn.GroupNorm(32, 64)
    results = []
    for conv in pair():
        torch.manual_seed(1)
        x = torch.randn(1, 64, side, side).contiguous(memory_format=torch.channels_last)
        residual = torch.randn(1, 80, side, side) if with_residual else None
        leaves = [x.requires_grad_(), *norm.parameters(), *conv.parameters()]
        if residual is not None:
            leaves.append(residual.requires_grad_())
        if isinstance(conv, WinogradConv2d):
            out = norm_silu_conv(x, norm, conv, residual)
        else:
            out = conv(F.silu(norm(x)))
            out = out if residual is None else out + residual
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert_close(*results)


@pytest.mark.parametrize("side", [24, 23, 8])
def test_what_comes_out_may_be_changed_in_place(side: int) -> None:
    for conv in pair():
        nn.functional.relu(conv(torch.randn(1, 64, side, side)), inplace=True).sum().backward()
        assert conv.weight.grad is not None


def test_the_other_way_is_taken_for_small_maps() -> None:
    plain, conv = pair()
    x, residual = torch.randn(1, 64, 8, 8), torch.randn(1, 80, 8, 8)
    with torch.no_grad():
        found = convolve(x, conv.weight, conv.bias, residual.clone())
        assert torch.equal(found, plain(x) + residual)
        assert torch.equal(conv(x), plain(x))
