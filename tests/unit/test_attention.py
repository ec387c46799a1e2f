"""The attention kinds against their formulas."""

import pytest
import torch

from kl_vae import make_attention
from tests.messages import mentions


@pytest.mark.parametrize("attn_type", ["vanilla", "linear", "none"])
def test_every_kind_keeps_the_shape_of_any_map(attn_type: str) -> None:
    x = torch.randn(2, 32, 3, 5)
    assert make_attention(attn_type, 32)(x).shape == x.shape


def test_vanilla_is_softmax_attention_over_the_positions_with_a_residual() -> None:
    attention, x = make_attention("vanilla", 32), torch.randn(2, 32, 3, 5)
    h = attention.norm(x)
    q, k, v = (f(h).reshape(2, 32, 15) for f in (attention.q, attention.k, attention.v))
    weights = (torch.einsum("bci,bcj->bij", q, k) / 32**0.5).softmax(dim=2)  # of key j for query i
    h = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + attention.proj_out(h))


def test_linear_weights_values_by_keys_normalised_over_the_positions() -> None:
    attention, x = make_attention("linear", 32), torch.randn(2, 32, 3, 5)
    q, k, v = attention.to_qkv(x).reshape(2, 3, 32, 15).unbind(1)
    weights = torch.einsum("bci,bcj->bij", q, k.softmax(dim=2))  # no N x N matrix in the module
    h = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    torch.testing.assert_close(attention(x), attention.to_out(h))


def test_linear_has_neither_norm_nor_residual_as_published() -> None:
    names = [name for name, _ in make_attention("linear", 32).named_parameters()]
    assert names == ["to_qkv.weight", "to_out.weight", "to_out.bias"]


def test_none_changes_nothing() -> None:
    x = torch.randn(1, 32, 2, 2)
    assert make_attention("none", 32)(x) is x


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match=mentions("attn_type='flash'", "linear, none")):
        make_attention("flash", 32)
