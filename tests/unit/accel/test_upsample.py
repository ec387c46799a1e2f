"""Upsampling and convolution in one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.upsample import MergedUpsample, transposed_convolution
from kl_vae.blocks import Upsample


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (4, 2)])
def test_it_is_the_convolution_of_the_upsampled_map(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    weight, bias = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.randn(4).double()
    for b in (bias, None):
        torch.testing.assert_close(transposed_convolution(x, weight, b), plain(x, weight, b))


def test_its_gradients_and_theirs_are_those_of_the_definition() -> None:
    arguments = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 2, 3, 2), (3, 2, 3, 3), (3,))
    ]
    assert torch.autograd.gradcheck(transposed_convolution, arguments)
    assert torch.autograd.gradgradcheck(transposed_convolution, arguments)


def test_upsample_gives_the_same_merged_or_not_forward_and_backward() -> None:
    torch.manual_seed(0)
    up, x = Upsample(8, with_conv=True), torch.randn(2, 8, 5, 4, requires_grad=True)
    results = []
    for up.__class__ in (Upsample, MergedUpsample):
        up.always = True
        up.zero_grad()
        x.grad = None
        y = up(x)
        y.square().mean().backward()
        grads = [p.grad.clone() for p in (x, *up.parameters()) if p.grad is not None]
        results.append([y.detach(), *grads])
    assert len(results[0]) == 4
    for merged, expected in zip(*results, strict=True):
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


class Doubled(nn.Conv2d):
    """Not what its class says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 5, padding=2),
        Doubled(4, 4, 3, padding=1),
        torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
    ],
    ids=["grouped", "reflecting", "dilated", "5 x 5", "subclass", "parametrized"],
)
def test_another_convolution_is_computed_as_it_is(conv: nn.Module) -> None:
    up, x = Upsample(4, with_conv=True), torch.randn(1, 4, 3, 3)
    up.__class__, up.always, up.conv = MergedUpsample, True, conv
    assert torch.equal(up(x), conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))


def test_hooks_of_the_convolution_are_called() -> None:
    up, x, seen = Upsample(4, with_conv=True), torch.randn(1, 4, 3, 3), []
    up.__class__, up.always = MergedUpsample, True
    handle = up.conv.register_forward_hook(lambda *given: seen.append(given[1][0].shape))
    up(x)
    handle.remove()
    up(x)
    assert seen == [(1, 4, 6, 6)]


def test_the_taps_are_added_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3)
    expected = plain(x, weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        merged = transposed_convolution(x, weight, None)
    assert merged.dtype == torch.bfloat16
    assert (merged - expected).abs().max() < 0.01 * expected.abs().max()
