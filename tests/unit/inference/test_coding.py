"""Encode and decode so that the result can be relied on."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.data import to_float
from kl_vae.inference.coding import decode_latents, encode_images

Z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


def test_they_are_those_of_the_model(model: AutoEncoderKL) -> None:
    with torch.no_grad():
        images, moments = model.decode(Z), model.encode(X).parameters
    torch.testing.assert_close(decode_latents(model, Z), images.clamp(-1.0, 1.0))
    torch.testing.assert_close(encode_images(model, X).parameters, moments)


def test_bytes_are_the_same_as_floats(model: AutoEncoderKL) -> None:
    images = torch.randint(0, 256, X.shape, dtype=torch.uint8)
    moments = encode_images(model, to_float(images)).parameters
    for layout in (torch.contiguous_format, torch.channels_last):
        given = images.contiguous(memory_format=layout)
        assert torch.equal(encode_images(model, given).parameters, moments)


def test_what_is_too_much_for_fp16_is_done_again(
    model: AutoEncoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        model.decoder.conv_out.weight *= 1e7
        model.quant_conv.weight *= 1e7
    with caplog.at_level(logging.WARNING):
        images = decode_latents(model, Z, "fp16")
        posterior = encode_images(model, X, "fp16")
    assert images.isfinite().all()
    assert posterior.parameters.isfinite().all()
    torch.testing.assert_close(images, decode_latents(model, Z))
    text = "3 of 3 images: NaN or infinity in fp16; redone in fp32"
    assert caplog.messages == [text, text.replace("3 of 3", "2 of 2")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_finite_is_an_error(model: AutoEncoderKL, precision: str) -> None:
    torch.nn.init.constant_(model.decoder.conv_out.bias, math.nan)
    torch.nn.init.constant_(model.quant_conv.bias, math.nan)
    with pytest.raises(ValueError, match="3 of 3 images: the decoded image in fp32 has NaN"):
        decode_latents(model, Z, precision)
    with pytest.raises(ValueError, match="2 of 2 images: the posterior in fp32 has NaN or"):
        encode_images(model, X, precision)
