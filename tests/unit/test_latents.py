"""Raw latents and normalised ones."""

from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.latents import LatentNormalization
from kl_vae.runtime.schema import from_mapping
from tests.messages import mentions

# [2, 3, 3, 5]: sides that a patch of 2 does not divide
Z = 3.0 * torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(0)) + 1.0


def test_scalars_shift_and_scale() -> None:
    normalization = LatentNormalization(scale_factor=0.3611, shift_factor=0.1159)
    torch.testing.assert_close(normalization.normalize(Z), (Z - 0.1159) * 0.3611)


def test_each_channel_has_its_own_where_asked_for() -> None:
    mean, std = (1.0, 2.0, 3.0), (0.5, 2.0, 4.0)
    of_channels = LatentNormalization(mean=mean, std=std, per_channel=True)
    for channel in range(3):
        expected = (Z[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(of_channels.normalize(Z)[:, channel], expected)
    scalars = LatentNormalization(mean=mean, std=std, scale_factor=2.0)
    torch.testing.assert_close(scalars.normalize(Z), 2.0 * Z)


def test_each_position_in_a_patch_has_its_own() -> None:
    mean = tuple(float(i) for i in range(12))
    normalization = LatentNormalization(mean=mean, std=(2.0,) * 12, patch_size=2, per_channel=True)
    z = normalization.normalize(Z)
    for channel in range(3):
        for row in range(3):
            for column in range(5):
                shift = mean[channel * 4 + (row % 2) * 2 + column % 2]
                expected = (Z[:, channel, row, column] - shift) / 2.0
                torch.testing.assert_close(z[:, channel, row, column], expected)


@pytest.mark.parametrize(
    "keys",
    [
        {"scale_factor": 0.18215},
        {"scale_factor": 1.5305, "shift_factor": 0.0609},
        {"mean": (1.0, 2.0, 3.0), "std": (0.5, 2.0, 4.0), "per_channel": True},
        {"mean": (1.0,) * 12, "std": (0.5,) * 12, "patch_size": 2, "per_channel": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denormalize_inverts_normalize(keys: dict[str, Any], dtype: torch.dtype) -> None:
    normalization = LatentNormalization(**keys)
    z = Z.to(dtype)
    back = normalization.denormalize(normalization.normalize(z))
    assert back.dtype == dtype
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(back, z, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"scale_factor": 0.0}, ("latents.scale_factor=0.0",)),
        ({"mean": [1.0]}, ("latents.std=null", "mean")),
        ({"std": [1.0]}, ("latents.mean=null", "std")),
        ({"per_channel": True}, ("latents.per_channel=True", "mean", "std")),
        ({"mean": [1.0], "std": [1.0, 2.0]}, ("latents.std", 2, "mean", 1)),
        ({"mean": [1.0], "std": [0.0]}, ("latents.std", 0)),
        ({"patch_size": 0}, ("latents.patch_size=0", 1)),
        ({"scaling_factor": 1.0}, ("latents.scaling_factor=1.0", "scale_factor")),
    ],
)
def test_an_invalid_value_is_named(keys: dict[str, Any], parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        from_mapping(LatentNormalization, keys, "latents")


@pytest.mark.parametrize("key", ["shift_factor", "mean"])
def test_only_finite_numbers_are_taken(key: str) -> None:
    values: dict[str, Any] = {"mean": (1.0,), "std": (1.0,)}
    values[key] = (float("nan"),) if key == "mean" else float("inf")
    with pytest.raises(ValueError, match=mentions(key, "finite")):
        LatentNormalization(**values)


def test_a_model_normalizes_with_its_latents_config(tiny_ddconfig: dict[str, Any]) -> None:
    model = AutoEncoderKL(tiny_ddconfig, 3, latents={"scale_factor": 0.5, "shift_factor": 1.0})
    torch.testing.assert_close(model.normalize_latents(Z), (Z - 1.0) * 0.5)
    torch.testing.assert_close(model.denormalize_latents(model.normalize_latents(Z)), Z)
    with pytest.raises(ValueError, match=mentions("[2, 2, 3, 5]", "[B, 3, h, w]")):
        model.normalize_latents(Z[:, :2])


def test_a_model_without_a_scale_is_an_error(tiny_model: AutoEncoderKL) -> None:
    for function in (tiny_model.normalize_latents, tiny_model.denormalize_latents):
        with pytest.raises(ValueError, match=mentions("kl-vae encode --statistics")):
            function(Z)


def test_statistics_of_another_number_of_channels_are_an_error(
    tiny_ddconfig: dict[str, Any],
) -> None:
    latents = {"mean": [1.0] * 4, "std": [1.0] * 4}
    with pytest.raises(ValueError, match=mentions("mean", 4, 3, "channels")):
        AutoEncoderKL(tiny_ddconfig, 3, latents=latents)
    with pytest.raises(ValueError, match=mentions("mean", 4, 3, "2 x 2", 12)):
        AutoEncoderKL(tiny_ddconfig, 3, latents={**latents, "patch_size": 2})
