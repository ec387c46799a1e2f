"""Encode, decode and reconstruct batches: precision, padding and memory limits."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.data import to_float
from kl_vae.inference.batches import latent_noise
from kl_vae.inference.coding import (
    decode_latents,
    encode_images,
    reconstruct_batch,
)
from kl_vae.inference.tiling import Tiling, modes
from kl_vae.inference.tiling.modes import Work
from kl_vae.model import padded_size
from tests.messages import is_about, mentions
from tests.tiny import reconstruct_image

TILING = Tiling()

Z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


class Hungry(AutoEncoderKL):
    """Allocates 4 PiB when decoding more than `most` images, which fails on any machine."""

    most = 0

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.empty(2**50) if len(z) > self.most else super().decode(z, context)


class Overflowing(AutoEncoderKL):
    """Returns NaN for images whose first value is positive, in half precision only."""

    everywhere = False

    def encode(self, x: Tensor, context: Tensor | None = None):
        posterior = super().encode(x, context)
        if torch.is_autocast_enabled("cpu") or self.everywhere:
            posterior.parameters[x[:, 0, 0, 0] > 0] = math.nan
        return posterior


def noise_image(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.rand(3, height, width, generator=generator) * 2 - 1


def of_class(kind: type[AutoEncoderKL], model: AutoEncoderKL) -> AutoEncoderKL:
    """Return a copy of the model as an instance of another class."""
    other = kind(model.config, model.embed_dim).eval()
    other.load_state_dict(model.state_dict())
    return other


def constant(model: AutoEncoderKL, value: float) -> AutoEncoderKL:
    """Make the decoder output `value` everywhere."""
    torch.nn.init.zeros_(model.get_last_layer())
    torch.nn.init.constant_(model.decoder.conv_out.bias, value)
    return model


def test_encode_and_decode_match_the_model(model: AutoEncoderKL) -> None:
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


def test_overflow_in_fp16_is_recomputed_in_fp32(
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
    decoding, encoding = caplog.messages
    assert is_about(decoding, 3, "NaN", "fp16", "fp32")
    assert is_about(encoding, 2, "NaN", "fp16", "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nan_in_fp32_is_an_error(model: AutoEncoderKL, precision: str) -> None:
    torch.nn.init.constant_(model.decoder.conv_out.bias, math.nan)
    torch.nn.init.constant_(model.quant_conv.bias, math.nan)
    with pytest.raises(ValueError, match=mentions(3, "fp32", "NaN")):
        decode_latents(model, Z, precision)
    with pytest.raises(ValueError, match=mentions(2, "fp32", "NaN")):
        encode_images(model, X, precision)


@pytest.mark.parametrize("size", [(1, 1), (3, 18), (8, 12), (13, 5)])
def test_any_size_is_edge_padded_and_cropped_back(
    model: AutoEncoderKL, size: tuple[int, int]
) -> None:
    image = noise_image(*size)
    height, width = size
    below, right = max(8 - height, -height % 4), max(8 - width, -width % 4)
    pixels = np.pad(image, ((0, 0), (0, below), (0, right)), mode="edge")
    assert padded_size(image, 4) == pixels.shape[1:]
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels)[None])
        expected = model.decode(posterior.mode())[0, :, :height, :width].clamp(-1, 1)
    result = reconstruct_image(model, image)
    assert result.shape == image.shape
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)


def test_a_batch_matches_single_images(model: AutoEncoderKL) -> None:
    images = [noise_image(*size) for size in ((13, 18), (16, 17), (14, 20))]
    noise = [latent_noise(model, x, torch.Generator().manual_seed(i)) for i, x in enumerate(images)]
    for draws in (None, noise):
        results = reconstruct_batch(model, images, "fp32", draws, TILING)
        for i, (image, result) in enumerate(zip(images, results, strict=True)):
            generator = None if draws is None else torch.Generator().manual_seed(i)
            expected = reconstruct_image(model, image, generator=generator)
            assert result.image is not None and result.image.shape == image.shape
            torch.testing.assert_close(result.image, expected, atol=1e-5, rtol=1e-5)


def test_a_sample_is_seeded_and_differs_from_the_mode(model: AutoEncoderKL) -> None:
    image = noise_image(8, 8)
    first, again = (
        reconstruct_image(model, image, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, reconstruct_image(model, image))


def test_bf16_is_close_to_fp32_but_not_equal(model: AutoEncoderKL) -> None:
    image = noise_image(8, 8)
    half, full = reconstruct_image(model, image, "bf16"), reconstruct_image(model, image)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1


def test_exact_tiling_matches_the_default(model: AutoEncoderKL) -> None:
    image = noise_image(40, 72)
    exact = reconstruct_image(model, image, tiling=Tiling("exact"))
    torch.testing.assert_close(exact, reconstruct_image(model, image), atol=1e-4, rtol=1e-4)


def test_overflow_in_half_precision_is_recomputed_in_fp32(model: AutoEncoderKL) -> None:
    overflowing = of_class(Overflowing, model)
    images = [noise_image(8, 8).abs() * sign for sign in (1, -1, 1)]
    results = reconstruct_batch(overflowing, images, "bf16", None, TILING)
    assert [result.redone_in_fp32 for result in results] == [True, False, True]
    for image, result, precision in zip(images, results, ("fp32", "bf16", "fp32"), strict=True):
        expected = reconstruct_image(model, image, precision)
        assert result.image is not None
        torch.testing.assert_close(result.image, expected, atol=0.02, rtol=0)


def test_nan_in_the_output_is_an_error(model: AutoEncoderKL) -> None:
    for value in (math.nan, math.inf):
        for precision in ("fp32", "fp16"):
            with pytest.raises(ValueError, match=mentions("fp32", "NaN")):
                reconstruct_image(constant(model, value), noise_image(4, 4), precision)
    overflowing = of_class(Overflowing, constant(model, 0.0))
    overflowing.everywhere = True
    images = [noise_image(8, 8).abs() * sign for sign in (1, -1)]
    results = reconstruct_batch(overflowing, images, "bf16", None, TILING)
    assert [result.image is None for result in results] == [True, False]
    assert is_about(results[0].reason, "fp32", "NaN") and results[0].redone_in_fp32


def test_a_batch_too_large_for_memory_is_split_into_single_images(model: AutoEncoderKL) -> None:
    hungry = of_class(Hungry, model)
    hungry.most = 1
    images = [noise_image(8, 12), noise_image(7, 11)]
    results = reconstruct_batch(hungry, images, "fp32", None, Tiling("whole"))
    for image, result in zip(images, results, strict=True):
        assert result.image is not None
        torch.testing.assert_close(result.image, reconstruct_image(model, image))


def test_a_batch_is_split_before_it_is_blended(
    model: AutoEncoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (
        [Work(model.config, decoding, batch, 64, 64).exact_bytes for decoding in (False, True)]
        for batch in (1, 2)
    )
    assert max(one) < max(two)
    monkeypatch.setattr(modes, "free_memory", lambda device: int(max(one) / 0.8) + 10)
    monkeypatch.setattr(modes, "warned_of_blending", warned := [])
    images = [noise_image(64, 64), noise_image(63, 62)]
    expected = [reconstruct_image(model, image, tiling=Tiling("exact")) for image in images]
    results = reconstruct_batch(model, images, "fp32", None, TILING)
    for image, result in zip(expected, results, strict=True):
        assert result.image is not None
        torch.testing.assert_close(result.image, image, atol=1e-5, rtol=1e-5)
    assert warned == []


def test_an_image_too_large_for_memory_is_computed_in_strips(model: AutoEncoderKL) -> None:
    image = noise_image(16, 24)
    hungry = of_class(Hungry, model)
    expected = reconstruct_image(model, image)
    result = reconstruct_image(hungry, image, tiling=Tiling("whole"))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    hungry.encoder.norm_out = torch.nn.Identity()  # unknown to the strips
    with pytest.raises(ValueError, match=mentions("24 x 16", "memory", "cpu")):
        reconstruct_image(hungry, image, tiling=Tiling("whole"))


def test_an_image_too_large_for_memory_in_any_mode_is_an_error(model: AutoEncoderKL) -> None:
    with pytest.raises(ValueError, match=mentions("8 x 4", "memory", "cpu")):
        reconstruct_image(of_class(Hungry, model), noise_image(4, 8), tiling=Tiling("blend"))


def test_other_errors_are_not_treated_as_out_of_memory(model: AutoEncoderKL) -> None:
    model.decoder.conv_in = torch.nn.Conv2d(7, 32, 3)
    with pytest.raises(RuntimeError, match="channels"):
        reconstruct_image(model, noise_image(4, 4))
