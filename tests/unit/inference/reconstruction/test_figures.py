"""What is measured of one image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kl_vae.inference.reconstruction import figures
from kl_vae.inference.reconstruction.figures import Figures, measure
from kl_vae.metrics.similarity import psnr, ssim


def pair(channels: int = 3, height: int = 12, width: int = 15) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, channels, height, width), generator=generator).byte()


def test_figures_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair()
    expected = Figures(
        *(7, 15, 12),
        psnr=psnr(x[None], y[None], (0, 255)).item(),
        ssim=ssim(x[None], y[None], (0, 255)).item(),
    )
    assert measure(7, x, y) == expected
    monkeypatch.setattr(figures, "_MEASURED_WHERE_THEY_ARE", 0)
    assert measure(7, x, y) == expected


def test_figures_of_floats() -> None:
    x, y = pair(5) / 255
    assert measure(0, x, y).psnr == psnr(x[None], y[None], (0, 1)).item()


def test_an_exact_and_tiny_image() -> None:
    x = pair(height=10)[0]
    assert measure(0, x, x) == Figures(0, 15, 10, psnr=None, ssim=None)
    assert measure(0, x, x, redone_in_fp32=True).redone_in_fp32


def test_lpips_is_of_values_from_minus_one_to_one() -> None:
    x, y = pair()

    def mean(x: Tensor, y: Tensor) -> Tensor:
        assert x.shape == y.shape == (1, 3, 12, 15)
        assert -1 <= x.min() < -0.9 and 0.9 < x.max() <= 1
        return (x - y).abs().mean((1, 2, 3))

    expected = (x.float() - y.float()).abs().mean().item() / 127.5
    assert measure(0, x, y, mean).lpips == pytest.approx(expected)
    assert measure(0, x, y, lambda x, y: torch.tensor([math.nan])).lpips is None
    assert measure(0, x, y, lambda x, y: torch.empty(2**50)).lpips is None
    with pytest.raises(RuntimeError, match="another"):
        measure(0, x, y, _fail)


def _fail(x: Tensor, y: Tensor) -> Tensor:
    raise RuntimeError("another")
