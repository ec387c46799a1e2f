"""The residual block and the resampling by 2."""

import pytest
import torch
import torch.nn.functional as F

from kl_vae.blocks import Downsample, Normalize, ResnetBlock, Upsample, zero_residuals


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
