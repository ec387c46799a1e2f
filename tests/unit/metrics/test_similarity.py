import math

import pytest
import torch

from kl_vae.metrics.similarity import ms_ssim, mse, psnr, ssim
from tests.messages import mentions


def test_psnr_is_the_formula_for_each_image():
    x = torch.zeros(2, 3, 4, 5)
    y = torch.stack([torch.full((3, 4, 5), 0.2), torch.full((3, 4, 5), 2.0)])
    expected = torch.tensor([20.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(psnr(x, y), expected, atol=1e-5, rtol=0)


def test_psnr_of_bytes_does_not_wrap_around():
    x, y = torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.full((1, 1, 2, 2), 255).byte()
    assert psnr(x, y, (0, 255)).item() == 0.0
    assert psnr(y, x, (0, 255)).item() == 0.0


def test_identical_images_have_infinite_psnr_and_ssim_of_one():
    x = torch.rand(2, 3, 16, 12) * 2 - 1
    assert psnr(x, x).tolist() == [math.inf] * 2
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))


def test_ssim_of_constant_images_is_the_luminance_term():
    x, y = torch.full((1, 1, 11, 11), 0.5), torch.full((1, 1, 11, 11), 1.0)
    c1 = 0.01**2
    expected = (2 * 0.5 + c1) / (0.25 + 1.0 + c1)
    assert ssim(x, y, (0, 1)).item() == pytest.approx(expected)


def test_figures_are_those_of_the_same_images_in_another_range():
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    for measure in (psnr, ssim):
        torch.testing.assert_close(measure(2 * x - 1, 2 * y - 1), measure(x, y, (0, 1)))


def test_ssim_needs_a_window():
    small, large = torch.rand(2, 3, 10, 40), torch.rand(2, 3, 11, 40)
    assert ssim(small, small).isnan().tolist() == [True, True]
    assert ssim(large, large).isfinite().all()
    small, large = torch.rand(2, 3, 6, 40), torch.rand(2, 3, 7, 40)
    assert ssim(small, small, variant="skimage").isnan().tolist() == [True, True]
    torch.testing.assert_close(ssim(large, large, variant="skimage"), torch.ones(2).double())
    with pytest.raises(ValueError, match=mentions("ssim='scikit'", "wang", "skimage")):
        ssim(large, large, variant="scikit")


def test_ms_ssim_needs_a_window_at_the_coarsest_scale():
    small, large = torch.rand(2, 1, 175, 200), torch.rand(2, 1, 176, 200)
    assert ms_ssim(small, small).isnan().tolist() == [True, True]
    torch.testing.assert_close(ms_ssim(large, large), torch.ones(2, dtype=torch.float64))


def test_ms_ssim_is_blind_to_what_the_coarser_scales_cannot_see():
    x = torch.rand(1, 1, 176, 176, generator=torch.Generator().manual_seed(0))
    checks = (torch.arange(176)[:, None] + torch.arange(176)) % 2 * 0.2 - 0.1
    y = x + checks
    assert ssim(x, y, (0, 1)) < ms_ssim(x, y, (0, 1)) < 1


def test_mse_is_of_images_from_0_to_1():
    x, y = torch.zeros(1, 3, 4, 5), torch.full((1, 3, 4, 5), 51.0)
    torch.testing.assert_close(mse(x, y, (0, 255)), torch.tensor([0.04], dtype=torch.float64))


def test_autocast_changes_nothing():
    x, y = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        under = psnr(x, y), ssim(x, y)
    assert under == (psnr(x, y), ssim(x, y))


@pytest.mark.parametrize("measure", [mse, psnr, ssim, ms_ssim])
def test_shapes_must_agree(measure):
    with pytest.raises(ValueError, match=mentions("[1, 3, 8, 8]", "[1, 3, 8, 9]")):
        measure(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match=mentions("[3, 8, 8]", "[B, C, H, W]")):
        measure(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))
