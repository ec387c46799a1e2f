"""Results in strips against those of the whole image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae import AutoEncoderKL
from kl_vae.accel.accelerate import accelerate
from kl_vae.attention import ATTENTION, VanillaAttention
from kl_vae.inference.tiling import Tiling, decode_tiled, encode_tiled, exact
from kl_vae.inference.tiling.exact import check_exact, decode_exact, encode_exact
from kl_vae.inference.tiling.strips import Moments, regroup, split
from tests.messages import mentions

MODELS: dict[str, dict[str, Any]] = {
    "kl-f8": dict(ch_mult=[1, 2, 4, 4]),
    "kl-f16": dict(ch_mult=[1, 1, 2, 2, 4], attn_resolutions=[16]),
    "without convolutions": dict(resamp_with_conv=False, attn_resolutions=[8, 32]),
    "linear": dict(attn_type="linear", attn_resolutions=[16], tanh_out=True),
    "no attention": dict(attn_type="none", norm_groups=8, embed_dim=None, ch_mult=[2, 1, 1]),
}
SIZES = {  # of latents: B, h, w
    "tall": (1, 19, 3),
    "wide": (2, 3, 13),
    "square": (1, 7, 7),
    "one line": (2, 1, 5),
}
STRIPS = {"one line": 1, "several": 30_000, "one": 2**30}


def build(**changes: Any) -> AutoEncoderKL:
    """Random weights in every layer, biases as well."""
    torch.manual_seed(0)
    embed_dim = changes.pop("embed_dim", 3)
    ddconfig = dict(
        ch=32,
        out_ch=3,
        ch_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_resolutions=[],
        in_channels=3,
        resolution=32 if len(changes.get("ch_mult", [])) < 5 else 256,
        z_channels=4,
    )
    model = AutoEncoderKL({**ddconfig, **changes}, embed_dim).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Compare relative to the largest value."""
    assert actual.dtype == expected.dtype
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


@torch.inference_mode()
def assert_exact(model: AutoEncoderKL, batch: int, height: int, width: int) -> None:
    f = model.downsampling_factor
    images = torch.rand(batch, 3, f * height, f * width) * 2 - 1
    z = torch.randn(batch, model.latent_channels, height, width)
    moments, decoded = model.encode(images).parameters, model.decode(z)
    for strip_bytes in STRIPS.values():
        assert_same(encode_exact(model, images, strip_bytes), moments)
        assert_same(decode_exact(model, z, strip_bytes), decoded)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_strips_of_any_size_match_the_whole_image(
    changes: dict[str, Any], size: tuple[int, int, int]
) -> None:
    assert_exact(build(**changes), *size)


def test_a_model_of_the_published_width() -> None:
    ddconfig = dict(build().params["ddconfig"], ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2)
    model = AutoEncoderKL(ddconfig, 4).eval()
    z = torch.randn(1, 4, 12, 16)  # 128 x 96 pixels
    with torch.inference_mode():
        whole = model.decode(z)
        assert_same(decode_exact(model, z, 2**20), whole)


def test_an_accelerated_model_in_strips() -> None:
    ddconfig = dict(build().params["ddconfig"], ch=64, ch_mult=[1, 2, 2])
    model = AutoEncoderKL(ddconfig, 4).eval()
    images, z = torch.rand(1, 3, 96, 68) * 2 - 1, torch.randn(1, 4, 17, 24)
    with torch.inference_mode():
        moments, decoded = model.encode(images).parameters, model.decode(z)
        accelerate(model)
        for strip_bytes in (100_000, 2**21):
            assert_same(encode_exact(model, images, strip_bytes), moments)
            assert_same(decode_exact(model, z, strip_bytes), decoded)


def test_half_precision_is_as_accurate_as_the_whole_image() -> None:
    model = build(ch_mult=[1, 2, 4, 4])
    images, z = torch.rand(1, 3, 80, 48), torch.randn(1, 3, 10, 6)
    with torch.inference_mode():
        reference = model.decode(z)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(
                encode_exact(model, images, 2**15), model.encode(images).parameters.bfloat16(), 0.03
            )
            strips, whole = decode_exact(model, z, 2**15), model.decode(z)
    assert_same(strips, whole, 0.03)
    errors = [(x.float() - reference).square().mean() for x in (strips, whole)]
    assert errors[0] < 1.2 * errors[1]


def test_a_model_in_double_precision_and_norms_without_weights() -> None:
    model = build().double()
    for half in (model.encoder, model.decoder):
        half.norm_out = nn.GroupNorm(32, half.norm_out.num_channels, affine=False)
    z = torch.randn(1, 3, 9, 4, dtype=torch.float64)
    assert_same(decode_tiled(model, z, Tiling("exact")), model.decode(z).detach(), 1e-10)


def test_attention_of_many_positions_takes_its_queries_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exact, "SCORE_BYTES", 4 * 133 * 10)
    assert [
        x.shape[2] for x in exact.chunks(torch.zeros(1, 1, 25, 2), torch.zeros(1, 1, 133, 2))
    ] == [10, 10, 5]
    assert_exact(build(), 1, 19, 7)


def test_moments_of_strips_are_merged_without_cancellation() -> None:
    x = 1000 + torch.randn(2, 8, 50, 3)  # the square of the mean is a million variances
    moments = Moments()
    for strip in split(x, 2, 7):
        moments.add(strip)
    norm = nn.GroupNorm(4, 8)
    expected = norm.double()(x.double()).float()
    torch.testing.assert_close(moments.normalization(norm)(x), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dim", [2, 3])
def test_regrouping_keeps_all_lines(dim: int) -> None:
    x = torch.randn(1, 2, 11, 11)
    for before, after in ((3, 4), (4, 3), (1, 20), (11, 2)):
        strips = list(regroup(split(x, dim, before), dim, after))
        assert [strip.shape[dim] for strip in strips[:-1]] == [after] * (len(strips) - 1)
        assert torch.equal(torch.cat(strips, dim), x)


class Doubled(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnAttention(VanillaAttention):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x.flip(2))


def test_a_custom_attention_is_applied_to_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTION._constructors, "own", OwnAttention)
    assert_exact(build(attn_type="own", attn_resolutions=[16]), 1, 9, 4)


def test_custom_blocks_and_norms_are_rejected() -> None:
    images, model = torch.zeros(1, 3, 8, 8), build()
    model.decoder.up[1].block[0].norm2 = Doubled(32, 64)
    parts = ("mode='exact'", "decoder.up.1.block.0.norm2", "Doubled", "mode='whole'", "'blend'")
    with pytest.raises(ValueError, match=mentions(*parts)):
        encode_tiled(model, images, Tiling("exact"))
    model = build()
    model.encoder.mid.block_2 = nn.Conv2d(64, 64, 1)
    with pytest.raises(ValueError, match=mentions("encoder.mid.block_2", "Conv2d")):
        check_exact(model)
    model = build()
    model.decoder.conv_out.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=mentions("decoder.conv_out", "hooks")):
        check_exact(model)
