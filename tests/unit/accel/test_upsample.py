"""Upsampling and convolution in one."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from kl_vae.accel.upsample import MergedUpsample, transposed_convolution, upsample_nearest
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


class Compiled(NamedTuple):
    """Results of `upsample_nearest` in a compiled graph, and the operations of its backward."""

    out: Tensor
    gradient: Tensor
    operations: set[str]


def compiled(x: Tensor, gradient: Tensor) -> Compiled:
    """Run compiled with the decompositions of torch's default backend, which needs no compiler."""
    operations = set()

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        operations.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=keep,
        decompositions=select_decomp_table(),
    )
    torch.compiler.reset()
    x = x.detach().requires_grad_()
    out = torch.compile(upsample_nearest, backend=backend, fullgraph=True)(x)
    (found,) = torch.autograd.grad(out, x, gradient)
    return Compiled(out.detach(), found, operations)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 1, 2, 2), (1, 3, 2, 1)])
def test_compiled_upsampling_has_the_same_bits_and_a_backward_without_scatter(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x = torch.randn(shape).to(dtype).to(memory_format=layout)
    eager = upsample_nearest(x)
    gradient = torch.randn(eager.shape).to(dtype).to(memory_format=layout)
    found = compiled(x, gradient)
    assert torch.equal(found.out, eager)
    assert found.out.is_contiguous(memory_format=layout)
    assert eager.is_contiguous(memory_format=layout)
    b, c, h, w = shape
    expected = gradient.double().reshape(b, c, h, 2, w, 2).sum((3, 5))
    tolerance = 1e-6 if dtype == torch.float32 else 0.04  # half an ulp of a sum below 8 is 0.016
    torch.testing.assert_close(found.gradient.double(), expected, atol=tolerance, rtol=0.0)
    assert found.operations
    assert not [name for name in found.operations if "scatter" in name or "index_put" in name]


def test_the_check_of_the_backward_finds_the_scatter_of_interpolate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: False)
    found = compiled(torch.randn(1, 2, 3, 3), torch.ones(1, 2, 6, 6))
    assert [name for name in found.operations if "index_put" in name]


def test_an_exported_graph_keeps_the_upsampling_that_runtimes_know() -> None:
    module, x = Upsample(4, with_conv=False), torch.randn(1, 4, 3, 5)
    module.__class__ = MergedUpsample
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x), module(x))
    assert "upsample_nearest2d" in str(exported.graph)
