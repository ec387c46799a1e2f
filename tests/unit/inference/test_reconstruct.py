import math

import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae import AutoEncoderKL
from kl_vae.data import ImageError, to_float, to_uint8
from kl_vae.inference.metrics import psnr, ssim
from kl_vae.inference.picture_files import as_picture, as_saved, image_suffix, save_image
from kl_vae.inference.reconstruct import ReconstructConfig, reconstruct, reconstruct_file


class Hungry(AutoEncoderKL):
    """Wants 4 PiB, which no machine gives."""

    def decode(self, z, context=None):
        return torch.empty(2**50)


def noise_image(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.rand(3, height, width, generator=generator) * 2 - 1


def save_picture(path, height: int, width: int) -> torch.Tensor:
    """Save noise as a PNG and return it, uint8 [3, H, W]."""
    image = to_uint8(noise_image(height, width))
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return image


def constant(model, value: float):
    """Let the decoder give `value` everywhere."""
    torch.nn.init.zeros_(model.get_last_layer())
    torch.nn.init.constant_(model.decoder.conv_out.bias, value)
    return model


@pytest.mark.parametrize("size", [(1, 1), (3, 18), (8, 12), (13, 5)])
def test_any_size_is_padded_at_its_edge_and_cropped_back(model, size):
    image = noise_image(*size)
    height, width = size
    below, right = max(8 - height, -height % 4), max(8 - width, -width % 4)
    pixels = np.pad(image, ((0, 0), (0, below), (0, right)), mode="edge")
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels)[None])
        expected = model.decode(posterior.mode())[0, :, :height, :width].clamp(-1, 1)
    result = reconstruct(model, image)
    assert result.shape == image.shape
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)


def test_a_sample_is_seeded_and_not_the_mode(model):
    image = noise_image(8, 8)
    first, again = (
        reconstruct(model, image, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, reconstruct(model, image))


def test_bf16_is_near_fp32_and_not_the_same(model):
    image = noise_image(8, 8)
    half, full = reconstruct(model, image, "bf16"), reconstruct(model, image)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1


def test_what_is_not_finite_is_no_picture(model):
    message = "the reconstruction in fp32 has NaN or infinity; try another precision"
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=message):
            reconstruct(constant(model, value), noise_image(4, 4))


def test_an_image_too_large_for_the_memory_is_named(model):
    hungry = Hungry(model.config, model.embed_dim).eval()
    message = "8 x 4 pixels do not fit into the memory of cpu; resize or crop, or leave it out"
    with pytest.raises(ValueError, match=message):
        reconstruct(hungry, noise_image(4, 8))


def test_other_errors_are_not_taken_for_a_lack_of_memory(model):
    with pytest.raises(RuntimeError, match="dtype|type"):
        reconstruct(model, noise_image(4, 4).double())


def test_the_figures_are_those_of_the_8_bit_pictures(model, tmp_path):
    image = save_picture(tmp_path / "a.png", 12, 15)
    result = reconstruct_file(model, tmp_path / "a.png", ReconstructConfig(), "a.png")
    assert torch.equal(result.image, image)
    assert torch.equal(result.reconstruction, to_uint8(reconstruct(model, to_float(image))))
    pair = image[None], result.reconstruction[None]
    assert (result.psnr, result.ssim) == (
        psnr(*pair, (0, 255)).item(),
        ssim(*pair, (0, 255)).item(),
    )


def test_exact_and_tiny_images(model, tmp_path):
    Image.new("RGB", (10, 10), (128,) * 3).save(tmp_path / "a.png")
    config = ReconstructConfig()
    result = reconstruct_file(constant(model, 0.0), tmp_path / "a.png", config, "a.png")
    assert math.isinf(result.psnr)
    assert math.isnan(result.ssim)


def test_resize_and_crop(model, tmp_path):
    save_picture(tmp_path / "a.png", 40, 60)
    for config, size in [
        (ReconstructConfig(resize=20), (20, 30)),
        (ReconstructConfig(crop=33), (33, 33)),
        (ReconstructConfig(resize=20, crop=16), (16, 16)),
    ]:
        result = reconstruct_file(model, tmp_path / "a.png", config, "a.png")
        assert result.image.shape == result.reconstruction.shape == (3, *size)
    with pytest.raises(ImageError, match=r"a\.png: 60 x 40 is smaller than the crop of 41; resize"):
        reconstruct_file(model, tmp_path / "a.png", ReconstructConfig(crop=41), "a.png")


def test_noise_depends_on_seed_and_name_alone(model, tmp_path):
    save_picture(tmp_path / "a.png", 8, 8)

    def sample(seed, name):
        config = ReconstructConfig(mode="sample", seed=seed)
        return reconstruct_file(model, tmp_path / "a.png", config, name).reconstruction

    assert torch.equal(sample(0, "a"), sample(0, "a"))
    assert not torch.equal(sample(0, "a"), sample(1, "a"))
    assert not torch.equal(sample(0, "a"), sample(0, "b"))


def test_a_bad_file_is_an_image_error(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing of the kind")
    with pytest.raises(ImageError, match=r"a\.png: not an image"):
        reconstruct_file(model, tmp_path / "a.png", ReconstructConfig(), "a.png")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("resize", 0, "resize=0: give at least 1 pixel, or None"),
        ("crop", -1, "crop=-1: give at least 1 pixel, or None"),
        ("mode", "mean", "mode='mean': give mode or sample"),
        ("precision", "fp8", "precision='fp8': give one of fp32, bf16, fp16"),
    ],
)
def test_impossible_values(key, value, message):
    with pytest.raises(ValueError, match=message):
        ReconstructConfig(**{key: value})


def test_five_channels_are_floats_in_the_unit_interval(model_of_five_channels, tmp_path):
    array = np.random.default_rng(0).random((12, 13, 5), dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    config = ReconstructConfig()
    result = reconstruct_file(model_of_five_channels, tmp_path / "a.npy", config, "a.npy")
    np.testing.assert_allclose(result.image.permute(1, 2, 0), array, atol=1e-6)
    pair = result.image[None], result.reconstruction[None]
    assert result.psnr == psnr(*pair, (0, 1)).item()
    assert image_suffix(5) == ".npy"
    save_image(tmp_path / "b.npy", result.reconstruction)
    saved = np.load(tmp_path / "b.npy")
    assert (saved.dtype, saved.shape) == (np.float32, (12, 13, 5))
    assert saved.min() >= 0
    assert saved.max() <= 1


def test_pictures_of_images(model):
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 5)
    assert as_saved(image)[0, 0].tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(as_picture(as_saved(image), model.to_rgb), as_saved(image))
    assert as_saved(image.repeat(2, 1, 1))[0, 0].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert image_suffix(1) == image_suffix(3) == image_suffix(4) == ".png"
