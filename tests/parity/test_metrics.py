"""PSNR, SSIM and MS-SSIM against scikit-image and torchmetrics."""

import pytest
import torch

from kl_vae.metrics.similarity import ms_ssim, psnr, ssim

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


@pytest.mark.parametrize("size", [(60, 83), (7, 7), (7, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_defaults_of_scikit_image(channels, size):
    x, y = (image[:, :, : size[0], : size[1]] for image in photograph_and_noisy(channels))
    images = x[0].numpy(), y[0].numpy()
    expected = skimage_metrics.structural_similarity(*images, channel_axis=0)
    assert ssim(x, y, (0, 255), "skimage").item() == pytest.approx(expected, abs=1e-9)
    scaled = [image / 255 for image in images]
    expected = skimage_metrics.structural_similarity(*scaled, channel_axis=0, data_range=1.0)
    unit = ssim(x / 255, y / 255, (0, 1), "skimage").item()
    assert unit == pytest.approx(expected, abs=1e-6)


def test_a_uniform_window_of_torchmetrics():
    x, y = (image.double() / 255 for image in photograph_and_noisy(3))
    _, everywhere = image_metrics.structural_similarity_index_measure(
        x, y, data_range=1.0, gaussian_kernel=False, kernel_size=7, return_full_image=True
    )
    inside = everywhere[..., 3:-3, 3:-3].mean().item()
    ours = ssim(x, y, (0, 1), "skimage").item()
    # its variances are those of a population: the constants count 49 / 48 times as much
    assert ours != pytest.approx(inside, abs=1e-7)
    assert ours == pytest.approx(inside, abs=1e-3)


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
    assert ssim(x, y, (0, 1)).item() != pytest.approx(everywhere.mean().item(), abs=1e-5)


def test_the_range_of_the_model_gives_the_figures_of_8_bits():
    x, y = photograph_and_noisy(3)
    measured = ssim(x / 127.5 - 1, y / 127.5 - 1)
    torch.testing.assert_close(measured, ssim(x, y, (0, 255)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(176, 176), (181, 203)])
def test_ms_ssim_of_torchmetrics(height, width):
    photographs = [skimage_data.astronaut(), skimage_data.coffee()[:400, :512]]
    x = torch.stack([torch.from_numpy(p[40 : 40 + height, 60 : 60 + width]) for p in photographs])
    x = x.permute(0, 3, 1, 2).double()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = (x + torch.tensor([10.0, 60.0]).view(2, 1, 1, 1) * noise).clamp(0, 255).round()
    expected = [
        image_metrics.multiscale_structural_similarity_index_measure(
            y[i : i + 1], x[i : i + 1], data_range=255.0
        ).double()
        for i in range(2)
    ]
    measured = ms_ssim(x.byte(), y.byte(), (0, 255))
    torch.testing.assert_close(measured, torch.stack(expected).flatten(), atol=1e-7, rtol=0)
    assert measured[1] < measured[0] < 1


def test_negative_terms_of_ms_ssim_count_as_0():
    x = torch.rand(1, 1, 176, 176, generator=torch.Generator().manual_seed(0)).double()
    expected = image_metrics.multiscale_structural_similarity_index_measure(
        1 - x, x, data_range=1.0
    )
    assert ms_ssim(x, 1 - x, (0, 1)).item() == expected.item() == 0.0
