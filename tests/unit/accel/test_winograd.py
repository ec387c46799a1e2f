"""Convolutions by Winograd's algorithm."""

from threading import Thread

import pytest
import torch
import torch.nn.functional as F

from kl_vae.accel import winograd
from kl_vae.accel.winograd import scratch, winograd_convolve, winograd_weight_gradient


@pytest.mark.parametrize("batch, height, width", [(1, 4, 4), (2, 7, 9), (3, 1, 5), (1, 30, 33)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_a_convolution_at_any_size(
    batch: int, height: int, width: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 5, height, width).to(memory_format=layout)
    weight, bias = torch.randn(7, 5, 3, 3), torch.randn(7)
    for b in (bias, None):
        out = winograd_convolve(x, weight, b)
        expected = F.conv2d(x, weight, b, padding=1)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", [(0, 1), (1, 0), (0, 0)])
def test_it_pads_as_it_is_told(padding: tuple[int, int]) -> None:
    x, weight = torch.randn(2, 3, 9, 6), torch.randn(4, 3, 3, 3)
    expected = F.conv2d(x, weight, padding=padding)
    torch.testing.assert_close(
        winograd_convolve(x, weight, None, padding), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("number", [1, 3, 7, 1000])
def test_pieces_of_any_size_give_the_same(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they do not divide rows and images, and the last one overlaps the one before."""
    x, weight = torch.randn(3, 4, 21, 8), torch.randn(4, 4, 3, 3)
    monkeypatch.setattr(winograd, "TILES", number)
    expected = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(winograd_convolve(x, weight, None), expected, rtol=1e-4, atol=1e-4)


def test_the_error_against_float64_is_as_documented() -> None:
    torch.manual_seed(0)
    channels = 512
    x, bias = torch.randn(1, channels, 24, 24), torch.randn(channels)
    weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5  # outputs of variance 1
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    error = (winograd_convolve(x, weight, bias) - expected).abs()
    assert error.max() < 2e-5
    assert error.square().mean().sqrt() < 3e-6


@pytest.mark.parametrize("number", [3, 1000])
def test_activation_and_residual_are_those_of_the_whole_maps(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "TILES", number)
    x, weight, residual = (torch.randn(*s) for s in ((3, 4, 21, 9), (4, 4, 3, 3), (3, 4, 21, 9)))
    scale, shift = torch.randn(3, 1, 1, 4), torch.randn(3, 1, 1, 4)
    out = winograd_convolve(x, weight, None, activation=(scale, shift), residual=residual)
    activated = F.silu(x * scale.permute(0, 3, 1, 2) + shift.permute(0, 3, 1, 2))
    expected = residual + F.conv2d(activated, weight, padding=1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width", [(20, 8), (21, 9)])
def test_a_residual_that_is_needed_no_longer_lends_its_memory(height: int, width: int) -> None:
    """Where tiles cover the map and nothing else."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, height, width), torch.randn(5, 4, 3, 3), torch.randn(5)
    residual = torch.randn(2, 5, height, width).contiguous(memory_format=torch.channels_last)
    expected = residual + F.conv2d(x, weight, bias, padding=1)
    out = winograd_convolve(x, weight, bias, residual=residual, overwrite=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (out.data_ptr() == residual.data_ptr()) == (height % 4 == 0)


@pytest.mark.parametrize("batch, height, width", [(1, 4, 4), (2, 7, 9), (3, 1, 5), (1, 30, 33)])
@pytest.mark.parametrize("number", [3, 1000])
def test_gradients_at_any_size_and_by_any_pieces(
    batch: int, height: int, width: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "TILES", number)
    monkeypatch.setattr(winograd, "GRADIENT_TILES", number)
    x, weight = torch.randn(batch, 5, height, width).double(), torch.randn(7, 5, 3, 3).double()
    gradient = torch.randn(batch, 7, height, width).double()
    shape, geometry = None, ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    expected = torch.ops.aten.convolution_backward(gradient, x, weight, shape, *geometry)
    x, weight, gradient = x.float(), weight.float(), gradient.float()
    of_x = winograd_convolve(gradient, weight, None, transforms=winograd.INPUT_GRADIENT)
    torch.testing.assert_close(of_x, expected[0].float(), rtol=1e-4, atol=1e-4)
    of_weight = winograd_weight_gradient(x, gradient)
    torch.testing.assert_close(of_weight, expected[1].float(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("batch, height, width", [(1, 4, 4), (2, 7, 9), (3, 1, 5)])
@pytest.mark.parametrize("number", [3, 1000])
def test_upsampling_is_part_of_it(
    batch: int, height: int, width: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "TILES", number)
    x, weight, bias = torch.randn(batch, 5, height, width), torch.randn(7, 5, 3, 3), torch.randn(7)
    out = winograd_convolve(x, weight, bias, transforms=winograd.UPSAMPLED)
    upsampled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = F.conv2d(upsampled, weight, bias, padding=1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    if height > 2:  # a part, whose neighbours' lines are there
        part = winograd_convolve(x, weight, bias, (0, 1), transforms=winograd.UPSAMPLED)
        torch.testing.assert_close(part, expected[:, :, 2:-2], rtol=1e-4, atol=1e-4)


def test_one_use_has_one_piece_of_memory_and_grows() -> None:
    first = scratch("test", 2, 3)
    assert first.shape == (2, 3) and first.dtype == torch.float32
    assert scratch("test", 3, 2).data_ptr() == first.data_ptr()
    assert scratch("other", 2, 3).data_ptr() != first.data_ptr()
    large = scratch("test", 100)
    assert large.data_ptr() == scratch("test", 5).data_ptr()


def test_threads_have_their_own() -> None:
    found: list[torch.Tensor] = []
    own = scratch("test", 7)
    thread = Thread(target=lambda: found.append(scratch("test", 7)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != own.data_ptr()


def test_what_inference_mode_made_is_written_to_beyond_it() -> None:
    with torch.inference_mode():
        scratch("test of modes", 4).zero_()
    with torch.no_grad():
        assert scratch("test of modes", 4).add_(1.0).tolist() == [1.0] * 4
