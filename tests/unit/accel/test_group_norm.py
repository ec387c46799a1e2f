"""A group norm as scale and shift."""

import pytest
import torch
from torch import nn

from kl_vae.accel import group_norm
from kl_vae.accel.group_norm import ChannelsLastGroupNorm, scale_and_shift, suits


@pytest.mark.parametrize("piece_bytes", [1, 4000, 2**30])
@pytest.mark.parametrize("affine", [False, True])
@torch.no_grad()
def test_it_is_the_norm(piece_bytes: int, affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm, "PIECE_BYTES", piece_bytes)
    torch.manual_seed(0)
    norm, x = nn.GroupNorm(4, 12, eps=1e-6, affine=affine), 2.0 * torch.randn(3, 12, 7, 5) - 1.0
    if affine:
        norm.weight.normal_()
        norm.bias.normal_()
    for layout in (torch.contiguous_format, torch.channels_last):
        scale, shift = scale_and_shift(norm, x.to(memory_format=layout))
        out = (scale * x.permute(0, 2, 3, 1) + shift).permute(0, 3, 1, 2)
        torch.testing.assert_close(out, norm(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_small_variance_beside_a_large_mean_is_kept() -> None:
    torch.manual_seed(0)
    x = 1000.0 + torch.randn(1, 32, 16, 16)
    norm = nn.GroupNorm(32, 32)
    scale, shift = scale_and_shift(norm, x)
    out = (scale.double() * x.permute(0, 2, 3, 1).double() + shift).permute(0, 3, 1, 2)
    expected = norm.double()(x.double())
    assert (out - expected).abs().max() < 3e-4  # the shift is 1000, to 6e-5


@torch.no_grad()
def test_a_large_map_is_normalised_to_float32s_precision() -> None:
    """Where torch's own kernel for this layout errs by 1e-4."""
    torch.manual_seed(0)
    x = (0.7 + 1.5 * torch.randn(1, 32, 512, 512)).to(memory_format=torch.channels_last)
    norm = ChannelsLastGroupNorm(8, 32, eps=1e-6)
    out = norm(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = nn.functional.group_norm(x.double().contiguous(), 8, eps=1e-6)
    assert (out - expected).abs().max() < 2e-6


def test_where_gradients_are_kept_it_is_torchs() -> None:
    x = torch.randn(1, 32, 4, 4).to(memory_format=torch.channels_last)
    norm = nn.GroupNorm(8, 32)
    assert not suits(norm, x)
    with torch.no_grad():
        assert suits(norm, x)
        assert not suits(norm, x.contiguous())
        assert not suits(norm, x.bfloat16())
