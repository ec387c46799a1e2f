import math

import pytest
import torch

from kl_vae.inference.sampled_images import sample_prior
from kl_vae.runtime.randomness import generator_for


def test_an_image_depends_on_seed_and_place_alone(model):
    images = list(sample_prior(model, number=5, size=8, batch_size=2))
    assert [image.shape for image in images] == [(3, 8, 8)] * 5
    for number, batch_size in [(5, 5), (3, 1)]:
        others = list(sample_prior(model, number, size=8, batch_size=batch_size))
        assert len(others) == number
        for image, other in zip(images, others, strict=False):
            torch.testing.assert_close(image, other)
    assert not torch.allclose(images[0], images[1])
    assert not torch.allclose(images[0], next(sample_prior(model, 1, size=8, seed=1)))


def test_images_are_decodes_of_the_prior(model):
    z = torch.randn(2, 2, 2, generator=generator_for("sample", 7, 0))
    with torch.no_grad():
        expected = model.decode(z[None])[0].clamp(-1, 1)
    torch.testing.assert_close(next(sample_prior(model, 1, size=8, seed=7)), expected)


@pytest.mark.parametrize(("size", "nearest"), [(9, 8), (1, 4), (15, 16), (0, 4)])
def test_the_size_must_be_a_multiple_of_f(model, size, nearest):
    with pytest.raises(ValueError, match=f"size={size}: must be a multiple of 4; give {nearest}"):
        next(sample_prior(model, 1, size))


def test_what_is_not_finite_is_no_picture(model):
    torch.nn.init.constant_(model.decoder.conv_out.bias, math.nan)
    with pytest.raises(ValueError, match="the decoded image in fp32 has NaN or infinity: "):
        next(sample_prior(model, 1, 8))
