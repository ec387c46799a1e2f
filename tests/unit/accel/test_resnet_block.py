"""SiLU in the memory of what it is of."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_vae.accel.resnet_block import activate
from kl_vae.blocks import Normalize


@pytest.mark.parametrize("keeps_gradients", [False, True])
@pytest.mark.parametrize("norm", [Normalize(32), nn.Identity(), nn.BatchNorm2d(32)])
def test_it_is_silu_of_the_norm_and_leaves_its_input(
    norm: nn.Module, keeps_gradients: bool
) -> None:
    x = torch.randn(2, 32, 3, 5)
    before = x.clone()
    with torch.set_grad_enabled(keeps_gradients):
        out = activate(x, norm, None)
    assert torch.equal(out, F.silu(norm(before)))
    assert torch.equal(x, before)


def test_what_a_hook_has_seen_stays() -> None:
    norm, kept = Normalize(32), []
    norm.register_forward_hook(lambda *given: kept.append(given[2]))
    with torch.no_grad():
        out = activate(torch.randn(1, 32, 4, 4), norm, None)
    assert torch.equal(out, F.silu(kept[0]))


def test_gradients_pass() -> None:
    norm, x = Normalize(32), torch.randn(1, 32, 4, 4, requires_grad=True)
    out: Tensor = activate(x, norm, None)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(F.silu(norm(x)).square().sum(), x)
    assert torch.equal(grad, expected)
