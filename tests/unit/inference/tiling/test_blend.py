"""Overlapping tiles and their blending."""

from __future__ import annotations

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.inference.tiling import Tiling, decode_tiled, encode_tiled
from kl_vae.inference.tiling.blend import ramps_of, spans_of
from tests.messages import mentions


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "starts"),
    [
        (5, 8, 2, [0]),
        (8, 8, 2, [0]),
        (9, 8, 2, [0, 1]),
        (14, 8, 2, [0, 6]),
        (15, 8, 2, [0, 4, 7]),
        (16, 8, 0, [0, 8]),
    ],
)
def test_tiles_cover_an_axis_evenly(
    length: int, tile: int, overlap: int, starts: list[int]
) -> None:
    spans = spans_of(length, tile, overlap)
    assert [start for start, _ in spans] == starts
    assert spans[-1][1] == length


@pytest.mark.parametrize("overlap", range(8))
@pytest.mark.parametrize("length", [3, 8, 9, 20, 33])
def test_any_tiles_overlap_enough_and_their_weights_add_up_to_1(length: int, overlap: int) -> None:
    spans = spans_of(length, 8, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(a[1] - b[0] >= overlap for a, b in zip(spans, spans[1:], strict=False))
    total = torch.zeros(length * 4)
    for (start, stop), weight in zip(spans, ramps_of(spans, 4), strict=True):
        assert weight.min() > 0
        total[start * 4 : stop * 4] += weight
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_ramp_is_linear() -> None:
    first, second = ramps_of([(0, 4), (2, 6)], 2)
    torch.testing.assert_close(first, torch.tensor([1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]))
    torch.testing.assert_close(second, first.flip(0))


@torch.inference_mode()
def test_one_tile_equals_the_whole_image(model: AutoEncoderKL) -> None:
    images, z = torch.randn(2, 3, 32, 24), torch.randn(2, 2, 8, 6)
    tiling = Tiling("blend", tile=32, overlap=16)
    posterior = encode_tiled(model, images, tiling)
    assert torch.equal(posterior.parameters, model.encode(images).parameters)
    assert torch.equal(decode_tiled(model, z, tiling), model.decode(z))


@torch.inference_mode()
@pytest.mark.parametrize("size", [(64, 24), (24, 68), (72, 40)])
def test_several_tiles_are_computed_separately(model: AutoEncoderKL, size: tuple[int, int]) -> None:
    images = torch.randn(1, 3, *size)
    tiling = Tiling("blend", tile=32, overlap=8)
    posterior, whole = encode_tiled(model, images, tiling), model.encode(images)
    z = whole.mode()
    decoded, whole_decoded = decode_tiled(model, z, tiling), model.decode(z)
    assert posterior.mean.shape == z.shape
    assert decoded.shape == images.shape
    for x, y in ((posterior.mean, z), (decoded, whole_decoded)):
        assert (x - y).abs().max() > 1e-3  # the norms see a tile only
    # a corner belongs to one tile alone
    corner = model.encode(images[:, :, :32, :32]).mean
    torch.testing.assert_close(posterior.mean[:, :, :2, :2], corner[:, :, :2, :2])


def test_half_precision_is_summed_in_float32(model: AutoEncoderKL) -> None:
    z = torch.randn(1, 2, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = decode_tiled(model, z, Tiling("blend", tile=32, overlap=8))
    assert decoded.dtype == torch.bfloat16
    full = decode_tiled(model, z, Tiling("blend", tile=32, overlap=8))
    torch.testing.assert_close(decoded.float(), full, rtol=0, atol=0.05 * full.abs().max().item())


@pytest.mark.parametrize(
    ("tile", "overlap", "parts"),
    [(30, 8, ("tile=30", 4, 32)), (32, 7, ("overlap=7", 4, 8))],
)
def test_tiles_must_be_multiples_of_the_downsampling_factor(
    model: AutoEncoderKL, tile: int, overlap: int, parts: tuple[object, ...]
) -> None:
    tiling = Tiling("blend", tile, overlap)
    with pytest.raises(ValueError, match=mentions(*parts)):
        encode_tiled(model, torch.zeros(1, 3, 64, 64), tiling)
    with pytest.raises(ValueError, match=mentions(*parts)):
        decode_tiled(model, torch.zeros(1, 2, 16, 16), tiling)
