"""Norm, SiLU and convolution that keep their input alone, and blocks that are computed twice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae import AutoEncoderKL
from kl_vae.accel.checkpointing import norm_silu, norm_silu_conv
from kl_vae.accel.resnet_block import FastResnetBlock, activate
from tests.messages import mentions

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def parts(dtype: torch.dtype = torch.float32) -> tuple[nn.GroupNorm, nn.Conv2d]:
    torch.manual_seed(0)
    norm, conv = nn.GroupNorm(4, 8, eps=1e-6), nn.Conv2d(8, 6, 3, padding=1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype), conv.to(dtype)


def maps(dtype: torch.dtype = torch.float32, layout: Any = torch.contiguous_format) -> list[Tensor]:
    """An input [2, 8, 5, 7] of the norm and a residual [2, 6, 5, 7]."""
    torch.manual_seed(1)
    shapes = (2, 8, 5, 7), (2, 6, 5, 7)
    tensors = [torch.randn(shape, dtype=dtype).contiguous(memory_format=layout) for shape in shapes]
    return [x.requires_grad_() for x in tensors]


def run(model: AutoEncoderKL, images: Tensor) -> list[Tensor]:
    """The reconstruction and all gradients."""
    torch.manual_seed(7)
    model.zero_grad()
    noise = torch.zeros(len(images), 3, images.shape[2] // 2, images.shape[3] // 2)
    reconstruction, posterior = model(images, noise=noise)
    ((reconstruction.float() - images).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    return [reconstruction.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients_are_those_of_autograd_bit_for_bit(layout: Any, with_residual: bool) -> None:
    norm, conv = parts()
    conv = conv.to(memory_format=layout)
    x, residual = maps(layout=layout)
    plain = conv(F.silu(norm(x)))
    plain = residual + plain if with_residual else plain
    gradient = torch.randn_like(plain)
    inputs = [x, *norm.parameters(), *conv.parameters(), *([residual] if with_residual else [])]
    expected = torch.autograd.grad(plain, inputs, gradient)
    out = norm_silu_conv(x, norm, conv, residual if with_residual else None)
    assert torch.equal(out, plain)
    for one, other in zip(torch.autograd.grad(out, inputs, gradient), expected, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()

    plain, out = F.silu(norm(x)), norm_silu(x, norm)
    expected = torch.autograd.grad(plain, inputs[:3], plain.detach())
    assert torch.equal(out, plain)
    found = torch.autograd.grad(out, inputs[:3], plain.detach())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_theirs_are_right(layout: Any) -> None:
    norm, conv = parts(torch.float64)
    x, residual = (t.detach()[:1, :, :3, :2].requires_grad_() for t in maps(torch.float64, layout))

    def of(function: Callable[..., Tensor], module: nn.Module) -> Callable[..., Tensor]:
        """The function, of the input and of all parameters."""

        def call(x: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
            return function(x, norm, conv, residual) if module is conv else function(x, norm)

        return call

    inputs = (x, residual, *norm.parameters(), *conv.parameters())
    assert torch.autograd.gradcheck(of(norm_silu_conv, conv), inputs)
    assert torch.autograd.gradcheck(of(norm_silu, norm), inputs)
    assert torch.autograd.gradgradcheck(of(norm_silu_conv, conv), inputs)
    assert torch.autograd.gradgradcheck(of(norm_silu, norm), inputs)


@pytest.mark.parametrize("frozen", ["x", "norm", "conv", "x and norm"])
def test_only_what_takes_a_gradient_is_given_one(frozen: str) -> None:
    norm, conv = parts()
    x, residual = maps()
    x.requires_grad_("x" not in frozen)
    norm.requires_grad_("norm" not in frozen)
    conv.requires_grad_("conv" not in frozen)
    gradients = []
    for out in (residual + conv(F.silu(norm(x))), norm_silu_conv(x, norm, conv, residual)):
        tensors = (x, residual, *norm.parameters(), *conv.parameters())
        for tensor in tensors:
            tensor.grad = None
        out.square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for tensor, plain, ours in zip(tensors, *gradients, strict=True):
        assert (plain is None) == (ours is None) == (not tensor.requires_grad)
        assert plain is None or torch.equal(plain, ours)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_under_autocast_the_norm_is_float32_and_the_convolution_is_not(
    precision: torch.dtype,
) -> None:
    block = FastResnetBlock(32, 64)
    torch.manual_seed(0)
    x = torch.randn(2, 32, 6, 4).requires_grad_()
    results = []
    for kind in ("none", "norms", "blocks"):
        block.activation_checkpointing = kind
        block.zero_grad()
        x.grad = None
        with torch.autocast("cpu", precision):
            out = block(x)
        assert out.dtype == precision
        out.float().square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in block.parameters())])
    for others in results[1:]:
        for plain, ours in zip(results[0], others, strict=True):
            assert plain.dtype == ours.dtype and torch.equal(plain, ours)


@pytest.mark.parametrize("kind", ["norms", "blocks"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_learns_the_same(
    kind: str, dropout: float, layout: Any, tiny_ddconfig: dict[str, Any], images: Tensor
) -> None:
    torch.manual_seed(0)
    model = AutoEncoderKL(tiny_ddconfig | {"dropout": dropout}, 3).to(memory_format=layout)
    images = images.contiguous(memory_format=layout)
    plain = run(model, images)
    model.set_activation_checkpointing(kind)
    assert all(torch.equal(a, b) for a, b in zip(run(model, images), plain, strict=True))
    model.set_activation_checkpointing("none")
    assert all(torch.equal(a, b) for a, b in zip(run(model, images), plain, strict=True))


def test_blocks_of_any_precision_learn_the_same() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        block, x = FastResnetBlock(32, 64).to(dtype), torch.randn(2, 32, 6, 4).to(dtype)
        gradients = []
        for kind in ("none", "norms", "blocks"):
            block.activation_checkpointing = kind
            total = block(x).float().square().sum()
            gradients.append(torch.autograd.grad(total, list(block.parameters())))
        for ours in gradients[1:]:
            assert all(torch.equal(a, b) for a, b in zip(ours, gradients[0], strict=True))


def test_the_context_reaches_a_block_that_is_computed_twice() -> None:
    torch.manual_seed(0)
    block = FastResnetBlock(32, 32, context_channels=3)
    x, context = torch.randn(2, 32, 4, 4), torch.randn(2, 3).requires_grad_()
    gradients = []
    for kind in ("none", "norms", "blocks"):
        block.activation_checkpointing = kind
        gradients.append(torch.autograd.grad(block(x, context).square().sum(), context)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_norms_and_convolutions_that_are_not_ours_are_called() -> None:
    class Doubling(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    x = torch.randn(1, 32, 4, 4)
    block = FastResnetBlock(32, 32)
    block.norm1 = Doubling(32, 32)
    block.conv2 = nn.utils.parametrizations.weight_norm(block.conv2)
    plain = block(x)
    block.activation_checkpointing = "norms"
    assert torch.equal(block(x), plain)
    assert torch.equal(activate(x, block.norm1, "norms"), F.silu(block.norm1(x)))


def test_hooks_are_called() -> None:
    block, seen = FastResnetBlock(32, 32), []
    block.activation_checkpointing = "norms"
    block.norm1.register_forward_hook(lambda *_: seen.append("norm1"))
    block.conv2.register_full_backward_hook(lambda *_: seen.append("conv2"))
    block(torch.randn(1, 32, 4, 4).requires_grad_()).sum().backward()
    assert seen == ["norm1", "conv2"]


def test_copies_keep_the_kind_and_state_dicts_do_not_know_it(tiny_model: AutoEncoderKL) -> None:
    keys = list(tiny_model.state_dict())
    tiny_model.set_activation_checkpointing("blocks")
    assert list(tiny_model.state_dict()) == keys
    for other in (copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))):
        kinds = {
            m.activation_checkpointing for m in other.modules() if isinstance(m, FastResnetBlock)
        }
        assert kinds == {"blocks"}


def test_an_unknown_kind_is_named(tiny_model: AutoEncoderKL) -> None:
    text = mentions("activation_checkpointing='all'", "none", "norms", "blocks")
    with pytest.raises(ValueError, match=text):
        tiny_model.set_activation_checkpointing("all")


def test_what_is_kept_for_the_backward_pass_falls_with_each_kind() -> None:
    """Bytes of the maps that twelve residual blocks keep, in units of one map."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(FastResnetBlock(32, 32) for _ in range(12)))
    parameters = {p.data_ptr() for p in blocks.parameters()}
    x = torch.randn(1, 32, 32, 32, requires_grad=True)
    kept: dict[str | None, float] = {}
    for kind in (None, "none", "norms", "blocks"):
        maps: dict[int, int] = {}

        def note(saved: Tensor, maps: dict[int, int] = maps) -> Tensor:
            if saved.data_ptr() not in parameters:
                maps[saved.data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        for block in blocks:
            block.activation_checkpointing = kind  # type: ignore[assignment]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            out = blocks(x)
        kept[kind] = sum(maps.values()) / (x.numel() * 4) / len(blocks)
        out.sum().backward()
    assert kept == {
        None: pytest.approx(6.0, abs=0.2),
        "none": pytest.approx(4.0, abs=0.2),
        "norms": pytest.approx(2.0, abs=0.2),
        "blocks": pytest.approx(1.0, abs=0.2),
    }
