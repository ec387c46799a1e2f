"""The residual block and the resampling by 2."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from kl_vae.blocks import (
    Downsample,
    Normalize,
    ResnetBlock,
    Upsample,
    upsample_nearest,
    zero_residuals,
)


def test_normalize_is_group_norm_over_32_groups() -> None:
    x = 3.0 * torch.randn(2, 64, 5, 7) + 1.0
    groups = x.reshape(2, 32, -1)
    mean, var = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
    expected = ((groups - mean) / (var + 1e-6).sqrt()).reshape(x.shape)
    torch.testing.assert_close(Normalize(64)(x), expected)


def test_a_resnet_block_adds_two_convolutions_to_its_shortcut() -> None:
    block = ResnetBlock(32, 64)
    x = torch.randn(2, 32, 6, 4)
    h = block.conv1(F.silu(block.norm1(x)))
    h = block.conv2(F.silu(block.norm2(h)))
    assert block(x).shape == (2, 64, 6, 4)
    torch.testing.assert_close(block(x), block.nin_shortcut(x) + h)


def test_a_resnet_block_of_equal_channels_has_no_shortcut_convolution() -> None:
    block = ResnetBlock(32, 32)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 32, 4, 4)
    assert not hasattr(block, "nin_shortcut")
    assert torch.equal(block(x), x)


def test_the_context_is_added_between_the_convolutions() -> None:
    block = ResnetBlock(32, 32, context_channels=3)
    x, context = torch.randn(2, 32, 4, 4), torch.randn(2, 3)
    h = block.conv1(F.silu(block.norm1(x))) + block.temb_proj(F.silu(context))[:, :, None, None]
    expected = x + block.conv2(F.silu(block.norm2(h)))
    torch.testing.assert_close(block(x, context), expected)


def test_downsample_averages_or_convolves_with_one_more_row_and_column() -> None:
    x = torch.randn(1, 4, 6, 8)
    means = x.reshape(1, 4, 3, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(Downsample(4, with_conv=False)(x), means)
    down = Downsample(4, with_conv=True)
    window = F.pad(x, (0, 1, 0, 1))[:, :, 4:7, 6:9]  # the last: rows 4, 5 and one of zeros
    expected = torch.einsum("bchw,ochw->bo", window, down.conv.weight) + down.conv.bias
    assert down(x).shape == (1, 4, 3, 4)
    torch.testing.assert_close(down(x)[:, :, -1, -1], expected)


@pytest.mark.parametrize("with_conv", [False, True])
def test_upsample_repeats_each_value_in_a_square(with_conv: bool) -> None:
    x = torch.randn(1, 4, 3, 5)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    up = Upsample(4, with_conv)
    torch.testing.assert_close(up(x), up.conv(repeated) if with_conv else repeated)


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
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x), module(x))
    assert "upsample_nearest2d" in str(exported.graph)


def test_group_norm_stays_float32_under_autocast_and_follows_the_model_without() -> None:
    norm, x = Normalize(64, groups=8), 100 * torch.randn(2, 64, 4, 4)
    assert norm.num_groups == 8 and Normalize(64).num_groups == 32
    expected = F.group_norm(x, 8, eps=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x.bfloat16())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.group_norm(x.bfloat16().float(), 8, eps=1e-6))
    torch.testing.assert_close(norm(x), expected)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_blocks_with_zero_residuals_are_their_shortcuts() -> None:
    blocks = torch.nn.ModuleList([ResnetBlock(32, 32), ResnetBlock(32, 64)])
    zero_residuals(blocks)
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(blocks[0](x), x)
    assert torch.equal(blocks[1](x), blocks[1].nin_shortcut(x))  # type: ignore[operator]
