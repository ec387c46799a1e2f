"""Operations, counted against formulas by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.benchmark.flops import MatrixProduct, count_flops, count_gan_flops
from kl_vae.benchmark.gan_step import build_step
from kl_vae.checkpoints.presets import PRESETS
from kl_vae.ddconfig import DDConfig

CPU = torch.device("cpu")


def convolution(c_in: int, c_out: int, side: int, kernel: int = 3) -> int:
    """Of one image, into c_out maps of side x side."""
    return 2 * kernel**2 * c_in * c_out * side**2


def block(c_in: int, c_out: int, side: int) -> int:
    shortcut = convolution(c_in, c_out, side, kernel=1) if c_in != c_out else 0
    return convolution(c_in, c_out, side) + convolution(c_out, c_out, side) + shortcut


def attention(c: int, side: int) -> int:
    positions = side**2
    return 4 * convolution(c, c, side, kernel=1) + 4 * positions**2 * c  # QK' and the mix of V


def middle(c: int, side: int) -> int:
    return 2 * block(c, c, side) + attention(c, side)


def encoder(config: DDConfig, embed_dim: int | None, size: int) -> int:
    total, side, c = convolution(config.in_channels, config.ch, size), size, config.ch
    for level, multiple in enumerate(config.ch_mult):
        for _ in range(config.num_res_blocks):
            total += block(c, config.ch * multiple, side)
            c = config.ch * multiple
            total += attention(c, side) * config.has_attention(level)
        if level < len(config.ch_mult) - 1:
            side //= 2
            total += convolution(c, c, side)
    z = 2 * config.z_channels
    total += middle(c, side) + convolution(c, z, side)
    return total + (convolution(z, 2 * embed_dim, side, 1) if embed_dim else 0)


def decoder(config: DDConfig, embed_dim: int | None, size: int) -> int:
    side, c = size // config.downsampling_factor, config.ch * config.ch_mult[-1]
    total = convolution(config.z_channels, c, side) + middle(c, side)
    total += convolution(embed_dim, config.z_channels, side, 1) if embed_dim else 0
    for level in reversed(range(len(config.ch_mult))):
        for _ in range(config.num_res_blocks + 1):
            total += block(c, config.ch * config.ch_mult[level], side)
            c = config.ch * config.ch_mult[level]
            total += attention(c, side) * config.has_attention(level)
        if level:
            side *= 2
            total += convolution(c, c, side)
    return total + convolution(c, config.out_ch, side)


@pytest.mark.parametrize("embed_dim", [None, 3])
def test_encode_and_decode_by_hand(tiny_ddconfig: dict[str, Any], embed_dim: int | None) -> None:
    config = DDConfig.from_dict(tiny_ddconfig)
    assert count_flops("encode", config, embed_dim, 2, 32) == 2 * encoder(config, embed_dim, 32)
    assert count_flops("decode", config, embed_dim, 2, 32) == 2 * decoder(config, embed_dim, 32)


def test_a_step_is_three_passes_but_for_the_gradient_of_the_image(
    tiny_ddconfig: dict[str, Any],
) -> None:
    config = replace(DDConfig.from_dict(tiny_ddconfig), dropout=0.5)
    forward = encoder(config, 3, 32) + decoder(config, 3, 32)
    first = convolution(config.in_channels, config.ch, 32)
    assert count_flops("step", config, 3, 1, 32) == 3 * forward - first


def test_the_published_size_takes_what_is_known_of_it_and_no_memory() -> None:
    config = PRESETS["kl-f8"].ddconfig
    assert count_flops("encode", config, 4, 1, 256) == encoder(config, 4, 256)
    assert count_flops("decode", config, 4, 1, 256) == decoder(config, 4, 256)
    assert round(encoder(config, 4, 256) / 1e9) == 273
    assert round(decoder(config, 4, 256) / 1e9) == 622
    large = count_flops("decode", config, 4, 16, 1024)
    assert large > 16 * 4**2 * decoder(config, 4, 256)  # attention grows faster than the pixels


def test_a_gan_step_by_its_parts(tiny_ddconfig: dict[str, Any]) -> None:
    config = DDConfig.from_dict(tiny_ddconfig)
    step = build_step(config, 3, CPU, 1, torch.nn.MSELoss())
    model = step.state.model
    before = [p.clone() for p in model.parameters()]
    # layers of 4 x 4: three of stride 2 from 32 pixels to 4, two of stride 1 to 3 and 2
    channels, sides = (3, 64, 128, 256, 512, 1), (16, 8, 4, 3, 2)
    layers = [
        convolution(c_in, c_out, side, kernel=4)
        for c_in, c_out, side in zip(channels, channels[1:], sides, strict=False)
    ]
    forward, first = sum(layers), layers[0]
    adversarial = 2 * forward  # forward, and the gradient of the image
    learning = 2 * (3 * forward - first)  # real and fake, to the parameters
    last = convolution(config.ch, 3, 32)  # twice, for the adaptive weight
    expected = count_flops("step", config, 3, 1, 32) + adversarial + learning + 2 * last
    assert count_gan_flops(model, 1, 32) == expected
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_matrix_product(precision: str) -> None:
    product = MatrixProduct(CPU, precision)
    product()
    assert product.flops == 2 * 2048**3
    assert product._out.dtype == product._a.dtype
    row = product._a[:1].float() @ product._b.float()
    torch.testing.assert_close(product._out[:1].float(), row, rtol=2e-2, atol=0.5)


def test_counting_leaves_the_model_of_a_caller_alone(tiny_model: AutoEncoderKL) -> None:
    state = torch.get_rng_state()
    count_flops("step", tiny_model.config, 3, 1, 16)
    assert torch.equal(state, torch.get_rng_state())
