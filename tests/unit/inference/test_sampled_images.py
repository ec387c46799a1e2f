"""Latents of the prior, between images, and of posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kl_vae
from kl_vae import AutoEncoderKL
from kl_vae.data import read_image, to_float
from kl_vae.inference.coding import decode_latents
from kl_vae.inference.sampled_images import (
    lerp,
    prior_latents,
    read_grid_identity,
    slerp,
)
from kl_vae.inference.tiling import Tiling
from kl_vae.runtime.randomness import generator_for
from tests.bad_files import png
from tests.messages import mentions

START = torch.tensor([2.0, 0.0, 0.0, 0.0]).view(1, 2, 2)
END = torch.tensor([0.0, 4.0, 0.0, 0.0]).view(1, 2, 2)


def test_slerp_interpolates_angle_and_length_linearly() -> None:
    for t in (0.0, 0.25, 0.5, 1.0):
        angle, length = t * math.pi / 2, 2 + 2 * t
        expected = torch.tensor([length * math.cos(angle), length * math.sin(angle), 0.0, 0.0])
        torch.testing.assert_close(slerp(START, END, t).flatten(), expected)
    assert slerp(START, END, 0.5).dtype == torch.float32


@pytest.mark.parametrize("end", [1.5 * START, -START, START * 0, START * (1 + 1e-7)])
def test_slerp_falls_back_to_lerp(end: torch.Tensor) -> None:
    for t in (0.0, 0.5, 1.0):
        torch.testing.assert_close(slerp(START, end, t), lerp(START, end, t))
        torch.testing.assert_close(slerp(end, START, t), lerp(end, START, t))


def test_interpolation_over_three_images(
    model: AutoEncoderKL, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    images = [make_images(tmp_path / "images", 3, size=(16, 16)) / f"{i:03d}.png" for i in range(3)]
    result = kl_vae.sample(model, tmp_path, origin="interpolation", images=images, steps=3)
    assert result.files[4] == "pair_00001_step_00001.png" and len(result.files) == 6
    decoded = [to_float(read_image(tmp_path / file, 3)) for file in result.files]
    with torch.no_grad():
        x = torch.stack([to_float(read_image(path, 3)) for path in images])
        z = model.encode(x).mode()
        middle = slerp(z[1], z[2], 0.5)
        expected = model.decode(torch.stack([*z, middle])).clamp(-1, 1)
    for found, wanted in ((0, 0), (2, 1), (3, 1), (5, 2), (4, 3)):
        assert (decoded[found] - expected[wanted]).abs().max() < 1.5 / 127.5


def prior_images(
    model: AutoEncoderKL, number: int, batch_size: int, seed: int = 0
) -> list[torch.Tensor]:
    """Images [3, 8, 8] as `kl_vae.sample` decodes them."""
    z = torch.stack([prior_latents(model, 8, seed, i) for i in range(number)])
    batches = z.split(batch_size)
    return [x for batch in batches for x in decode_latents(model, batch, tiling=Tiling("whole"))]


def test_a_prior_sample_depends_only_on_seed_and_index(model: AutoEncoderKL) -> None:
    images = prior_images(model, number=5, batch_size=2)
    assert [image.shape for image in images] == [(3, 8, 8)] * 5
    for number, batch_size in [(5, 5), (3, 1)]:
        others = prior_images(model, number, batch_size)
        assert len(others) == number
        for image, other in zip(images, others, strict=False):
            torch.testing.assert_close(image, other)
    assert not torch.allclose(images[0], images[1])
    z = torch.randn(2, 2, 2, generator=generator_for("sample", 7, 0))
    with torch.no_grad():
        expected = model.decode(z[None])[0].clamp(-1, 1)
    torch.testing.assert_close(prior_images(model, 1, 1, seed=7)[0], expected)


@pytest.mark.parametrize(("size", "nearest"), [(9, 8), (1, 4), (15, 16), (0, 4)])
def test_the_size_must_be_a_multiple_of_f(
    model: AutoEncoderKL, tmp_path: Path, size: int, nearest: int
) -> None:
    with pytest.raises(ValueError, match=mentions(f"size={size}", 4, nearest)):
        kl_vae.sample(model, tmp_path, number=1, size=size)


def test_nan_in_the_output_is_an_error(model: AutoEncoderKL, tmp_path: Path) -> None:
    torch.nn.init.constant_(model.decoder.conv_out.bias, math.nan)
    with pytest.raises(ValueError, match=mentions("fp32", "NaN")):
        kl_vae.sample(model, tmp_path, number=1, size=8)


def test_five_channels_are_saved_as_npy(
    model_of_five_channels: AutoEncoderKL, tmp_path: Path
) -> None:
    result = kl_vae.sample(model_of_five_channels, tmp_path / "out", number=2, size=8)
    assert result.files == ("sample_00000.npy", "sample_00001.npy") and result.shown == 2
    assert read_image(tmp_path / "out" / "grid.png", 3).shape == (3, 8 + 4, 2 * 10 + 2)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"origin": "gaussian"}, ("origin='gaussian'", "prior", "interpolation", "posterior")),
        ({"origin": "posterior"}, ("images=[]", "posterior")),
        ({"images": "x"}, ("images=['x']", "prior")),
    ],
)
def test_arguments_are_checked(
    model: AutoEncoderKL, tmp_path: Path, arguments: dict[str, str], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        kl_vae.sample(model, tmp_path / "out", **arguments)  # type: ignore[arg-type]


def test_a_grid_that_cannot_be_read_has_no_identity(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    assert read_grid_identity(path) is None
    for content in (b"", b"no image", png(60_000, 60_000, b"", bits=1)):  # too many pixels
        path.write_bytes(content)
        assert read_grid_identity(path) == {}
