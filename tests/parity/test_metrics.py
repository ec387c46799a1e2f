"""PSNR and SSIM against scikit-image and torchmetrics."""

import pytest
import torch

from kl_vae.inference.metrics import psnr, ssim

skimage_data = pytest.importorskip("skimage.data")
skimage_metrics = pytest.importorskip("skimage.metrics")
image_metrics = pytest.importorskip("torchmetrics.functional.image")


def photograph_and_noisy(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two uint8 images [1, C, 60, 83]."""
    photograph = torch.from_numpy(skimage_data.astronaut()[100:160, 180:263])
    x = photograph.permute(2, 0, 1)[None, :channels]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x, (x + 12 * noise).clamp(0, 255).round().byte()


@pytest.mark.parametrize("channels", [1, 3])
def test_scikit_image(channels):
    x, y = photograph_and_noisy(channels)
    images = x[0].numpy(), y[0].numpy()
    expected = skimage_metrics.structural_similarity(
        *images,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    assert ssim(x, y, (0, 255)).item() == pytest.approx(expected, abs=1e-9)
    expected = skimage_metrics.peak_signal_noise_ratio(*images, data_range=255)
    assert psnr(x, y, (0, 255)).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchmetrics(channels):
    x, y = (image.double() / 255 for image in photograph_and_noisy(channels))
    expected = image_metrics.peak_signal_noise_ratio(x, y, data_range=1.0)
    torch.testing.assert_close(psnr(x, y, (0, 1)), expected[None].double(), atol=1e-5, rtol=0)
    # its own mean is over windows that reach into a padding by reflection as well
    _, everywhere = image_metrics.structural_similarity_index_measure(
        x, y, data_range=1.0, return_full_image=True
    )
    expected = everywhere[..., 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(ssim(x, y, (0, 1)), expected, atol=1e-9, rtol=0)


def test_the_range_of_the_model_gives_the_figures_of_8_bits():
    x, y = photograph_and_noisy(3)
    measured = ssim(x / 127.5 - 1, y / 127.5 - 1)
    torch.testing.assert_close(measured, ssim(x, y, (0, 255)), atol=1e-6, rtol=0)
