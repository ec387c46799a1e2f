"""Rotating and scaling latents and images together."""

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.losses.equivariance import Equivariance, resize, resize_by_matrices
from kl_vae.runtime.device import deterministic


def test_the_ratio_of_image_and_latent_sizes_is_kept() -> None:
    z, x = torch.randn(2, 4, 8, 12), torch.randn(2, 3, 32, 48)
    for quarter_turns in range(4):
        for scale in (0.25, 0.4, 0.99, 1.0):
            transformation = Equivariance(quarter_turns, scale)
            latents, images = transformation.of_latents(z), transformation.of_images(x, 4)
            height, width = latents.shape[2:]
            assert images.shape == (2, 3, 4 * height, 4 * width)
            expected = (round(12 * scale), round(8 * scale))
            assert (height, width) == (expected if quarter_turns % 2 else expected[::-1])


def test_a_quarter_turn_rotates_both_in_the_same_direction() -> None:
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    turned = Equivariance(1, 1.0).of_latents(x)
    assert turned.flatten().tolist() == [1.0, 3.0, 0.0, 2.0]
    assert torch.equal(turned, Equivariance(1, 1.0).of_images(x, 1))


def test_scaling_keeps_constants_and_at_least_one_pixel() -> None:
    plane = torch.full((1, 2, 8, 8), 0.7)
    assert torch.allclose(Equivariance(0, 0.3).of_latents(plane), torch.tensor(0.7))
    assert Equivariance(0, 0.01).of_latents(plane).shape == (1, 2, 1, 1)


def test_a_draw_is_a_function_of_its_key_with_the_given_probability() -> None:
    draws = [Equivariance.draw(0.5, 0.25, 7, step) for step in range(400)]
    assert draws == [Equivariance.draw(0.5, 0.25, 7, step) for step in range(400)]
    assert draws != [Equivariance.draw(0.5, 0.25, 8, step) for step in range(400)]
    happened = [draw for draw in draws if draw is not None]
    assert 150 < len(happened) < 250
    assert {draw.quarter_turns for draw in happened} == {0, 1, 2, 3}
    scales = [draw.scale for draw in happened]
    assert 0.25 <= min(scales) < 0.3 and 0.95 < max(scales) <= 1.0
    assert Equivariance.draw(0.0, 0.25, 7) is None
    assert all(Equivariance.draw(1.0, 0.25, 7, step) is not None for step in range(20))


def test_the_loss_compares_with_the_transformed_image(tiny_model: AutoEncoderKL) -> None:
    images = torch.rand(2, 3, 16, 32) * 2 - 1
    transformation = Equivariance(1, 0.5)
    out = tiny_model.step(images, 0, "train", equivariance=transformation)
    assert out.target.shape == out.reconstruction.shape == (2, 3, 16, 8)
    assert torch.equal(out.target, transformation.of_images(images, 2))
    expected = (out.target - out.reconstruction).square().mean()
    assert torch.allclose(out.log["train/rec_loss"], expected)
    assert out.posterior.mean.shape == (2, 3, 8, 16)  # of the original image
    out.total.backward()
    assert all(p.grad is not None for p in tiny_model.parameters())


def test_the_identity_changes_nothing(tiny_model: AutoEncoderKL) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, 3, 8, 8)
    plain = tiny_model.step(images, 0, "train", noise=noise)
    same = tiny_model.step(images, 0, "train", noise=noise, equivariance=Equivariance(0, 1.0))
    assert torch.equal(plain.total, same.total)
    with pytest.raises(AttributeError):
        Equivariance(0, 1.0).scale = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("size", [(3, 5), (7, 9), (1, 1), (8, 4), (13, 20)])
def test_matrices_resize_as_interpolation_does_forward_and_backward(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    theirs, ours = resize(x, size), resize_by_matrices(x, size)
    gradient = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0.0)
    expected, found = (torch.autograd.grad(out, x, gradient)[0] for out in (theirs, ours))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_resize_in_float32_in_all_precisions(dtype: torch.dtype) -> None:
    x = torch.randn(1, 4, 16, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_by_matrices(x, (9, 5))
    assert found.dtype == dtype
    expected = resize_by_matrices(x.double(), (9, 5))
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, atol=8 * unit, rtol=unit)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_latents_have_a_deterministic_gradient_on_cuda() -> None:
    gradients = []
    with deterministic(True):
        for _ in range(2):
            z = torch.arange(4.0 * 32 * 32, device="cuda").reshape(1, 4, 32, 32).sin()
            z.requires_grad_()
            Equivariance(1, 0.4).of_latents(z).square().sum().backward()
            gradients.append(z.grad)
    assert torch.equal(*gradients)
