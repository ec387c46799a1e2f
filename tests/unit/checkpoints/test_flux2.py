"""Convert the batch norm over latent patches of FLUX.2 to means and stds and back."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.diffusers import EPS, batch_norm, take_batch_norm, with_quant_convolutions
from kl_vae.checkpoints.safetensors_file import read_safetensors, safetensors_bytes
from kl_vae.latents import LatentNormalization
from tests.conftest import TINY_DDCONFIG
from tests.messages import mentions

Tensors = dict[str, Tensor]


def of_torch(channels: int, seed: int = 0) -> nn.BatchNorm2d:
    """A batch norm with random statistics."""
    generator = torch.Generator().manual_seed(seed)
    bn = nn.BatchNorm2d(4 * channels, eps=EPS, affine=False).eval()
    assert bn.running_mean is not None and bn.running_var is not None
    bn.running_mean.normal_(generator=generator)
    bn.running_var.exponential_(generator=generator)
    return bn


def tensors_of(bn: nn.BatchNorm2d, channels: int = 3) -> Tensors:
    named = {f"bn.{key}": x for key, x in bn.state_dict().items()}
    return named | {"post_quant_conv.weight": torch.zeros(8, channels, 1, 1)}


def test_round_trip_is_exact() -> None:
    bn = of_torch(64)
    assert bn.running_var is not None
    # from close to zero to far beyond the range of latents
    bn.running_var *= torch.logspace(-7, 9, 256)
    tensors = tensors_of(bn, 64)
    rest, latents = take_batch_norm(tensors)
    assert rest.keys() == {"post_quant_conv.weight"}
    assert latents is not None
    again = batch_norm(latents)
    assert again.keys() == tensors.keys() - rest.keys()
    for key in ("bn.running_mean", "bn.running_var"):
        assert again[key].dtype == torch.float32
        assert torch.equal(again[key], tensors[key])
    assert again["bn.num_batches_tracked"].dtype == tensors["bn.num_batches_tracked"].dtype
    checked = dataclasses.asdict(LatentNormalization(**latents))
    assert torch.equal(batch_norm(checked)["bn.running_var"], tensors["bn.running_var"])
    torch.nn.BatchNorm2d(256, affine=False).load_state_dict(
        {key.removeprefix("bn."): x for key, x in again.items()}
    )


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (8, 2)])
def test_the_order_matches_batch_norm_over_patches(height: int, width: int) -> None:
    """The value of channel c at (row, column) of a patch has index c * 4 + row * 2 + column."""
    bn = of_torch(3)
    _, latents = take_batch_norm(tensors_of(bn))
    assert latents is not None
    assert latents["patch_size"] == 2 and latents["per_channel"] is True
    z = torch.randn(2, 3, height, width)
    patches = z.view(2, 3, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    expected = bn(patches.reshape(2, 12, height // 2, width // 2))
    expected = expected.view(2, 3, 2, 2, height // 2, width // 2).permute(0, 1, 4, 2, 5, 3)
    normalised = LatentNormalization(**latents).normalize(z)
    assert torch.allclose(normalised, expected.reshape(z.shape), rtol=1e-5, atol=1e-6)
    assert torch.allclose(LatentNormalization(**latents).denormalize(normalised), z, atol=1e-5)


def test_each_position_has_its_own_value() -> None:
    bn = of_torch(3)
    assert bn.running_mean is not None and bn.running_var is not None
    bn.running_mean.copy_(torch.arange(12.0))
    bn.running_var.fill_(1.0 - EPS)
    _, latents = take_batch_norm(tensors_of(bn))
    assert latents is not None
    shift = LatentNormalization(**latents).denormalize(torch.zeros(1, 3, 4, 4))
    c, row, column = torch.meshgrid(*map(torch.arange, (3, 4, 4)), indexing="ij")
    assert torch.equal(shift[0], (c * 4 + row % 2 * 2 + column % 2).float())


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2])
def test_eps_is_added_to_the_variance(eps: float) -> None:
    bn = of_torch(3)
    bn.eps = eps
    _, latents = take_batch_norm(tensors_of(bn), eps)
    assert latents is not None
    assert bn.running_var is not None
    assert latents["std"] == tuple((bn.running_var.double() + eps).sqrt().tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_read(dtype: torch.dtype) -> None:
    tensors = {
        key: x.to(dtype) if x.is_floating_point() else x
        for key, x in tensors_of(of_torch(3)).items()
    }
    _, latents = take_batch_norm(tensors)
    assert latents is not None
    assert latents["mean"] == tuple(tensors["bn.running_mean"].double().tolist())


@pytest.mark.parametrize("lacking", ["bn.running_mean", "bn.running_var", "post_quant_conv.weight"])
def test_an_incomplete_batch_norm_gives_none(lacking: str) -> None:
    tensors = tensors_of(of_torch(3)) | {"encoder.x": torch.zeros(1)}
    del tensors[lacking]
    rest, latents = take_batch_norm(tensors)
    assert latents is None
    assert rest.keys() == {"encoder.x", "post_quant_conv.weight"} - {lacking}


def test_channels_are_those_of_the_decoder() -> None:
    tensors = tensors_of(of_torch(3))
    tensors["decoder.conv_in.weight"] = torch.zeros(8, 3, 3, 3)
    del tensors["post_quant_conv.weight"]
    _, latents = take_batch_norm(tensors)
    assert latents is not None and latents["patch_size"] == 2


def test_tensors_without_a_batch_norm_are_unchanged() -> None:
    tensors = {"encoder.x": torch.zeros(1), "bn.weight": torch.zeros(1)}
    assert take_batch_norm(tensors) == (tensors, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoder.quant_conv.weight", "quant_conv.weight"),
        ("decoder.post_quant_conv.bias", "post_quant_conv.bias"),
        ("quant_conv.weight", "quant_conv.weight"),
        ("encoder.quant_convolution", "encoder.quant_convolution"),
        ("loss.encoder.quant_conv.weight", "loss.encoder.quant_conv.weight"),
    ],
)
def test_quant_convolutions_are_moved_to_the_top_level(old: str, new: str) -> None:
    assert with_quant_convolutions({old: torch.zeros(1)}).keys() == {new}


@pytest.fixture(scope="module")
def latents() -> dict[str, Any]:
    _, latents = take_batch_norm(tensors_of(of_torch(4), 4))
    assert latents is not None
    return latents


def own_names(model: AutoEncoderKL, bn: Tensors) -> Tensors:
    """The published layout: CompVis names except for the quant convolutions."""
    return {
        {"quant": "encoder.", "post_": "decoder."}.get(key[:5], "") + key: x
        for key, x in (model.state_dict() | bn).items()
    }


@pytest.mark.parametrize("embed_dim", [4, None])
def test_a_loaded_model_has_its_batch_norm(
    latents: dict[str, Any], embed_dim: int | None, tmp_path: Path
) -> None:
    model = AutoEncoderKL(TINY_DDCONFIG, embed_dim, latents=latents)
    model.save_pretrained(tmp_path / "vae")
    assert AutoEncoderKL.from_checkpoint(tmp_path / "vae").latents == model.latents
    # and from one file, without a config
    content = safetensors_bytes(own_names(model, batch_norm(latents)), {})
    (tmp_path / "ae.safetensors").write_bytes(content)
    read = AutoEncoderKL.from_checkpoint(tmp_path / "ae.safetensors")
    assert read.latents == model.latents
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in read.state_dict().items())


def test_eps_is_read_from_the_config(latents: dict[str, Any], tmp_path: Path) -> None:
    AutoEncoderKL(TINY_DDCONFIG, 4, latents=latents).save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.0001", "0.5"))
    read = AutoEncoderKL.from_checkpoint(tmp_path / "vae").latents
    assert read is not None and read.std is not None
    expected = (torch.tensor(latents["std"]).square() - EPS + 0.5).sqrt()
    assert torch.allclose(torch.tensor(read.std), expected)
    # a variance of 0 with an eps of 0
    config.write_text(config.read_text().replace("0.5", "0"))
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    content = read_safetensors(weights, lambda keys: keys).tensors
    content |= {"bn.running_var": torch.zeros(16)}
    weights.write_bytes(safetensors_bytes(content, {}))
    with pytest.raises(ValueError, match=mentions("latents.std", "finite", 0)):
        AutoEncoderKL.from_checkpoint(tmp_path / "vae")


WRONG: list[tuple[Tensors, tuple[object, ...]]] = [
    ({"bn.running_mean": torch.zeros(15)}, ("latents.std", 16, "mean", 15)),
    ({"bn.running_var": torch.ones(17)}, ("latents.std", 17, "mean", 16)),
    ({"bn.running_mean": torch.zeros(())}, ("latents.std", 16, "mean", 1)),
    (
        {"bn.running_mean": torch.zeros(0), "bn.running_var": torch.zeros(0)},
        ("latents.patch_size=0", 1),
    ),
    (
        {"bn.running_mean": torch.zeros(3), "bn.running_var": torch.ones(3)},
        ("latents.patch_size=0", 1),
    ),
    (
        {"bn.running_mean": torch.zeros(17), "bn.running_var": torch.ones(17)},
        ("mean", 17, 4, "2 x 2", 16),
    ),
    ({"bn.running_mean": torch.zeros(5), "bn.running_var": torch.ones(5)}, ("mean", 5, 4)),
    ({"bn.running_var": torch.full((16,), -1.0)}, ("latents.std[0]=nan", "finite")),
    ({"bn.running_var": torch.full((16,), torch.nan)}, ("latents.std[0]=nan", "finite")),
    ({"bn.running_mean": torch.full((16,), torch.inf)}, ("latents.mean[0]=inf", "finite")),
]


@pytest.mark.parametrize(("wrong", "parts"), WRONG)
def test_an_invalid_batch_norm_is_an_error(
    latents: dict[str, Any], wrong: Tensors, parts: tuple[object, ...], tmp_path: Path
) -> None:
    model = AutoEncoderKL(TINY_DDCONFIG, 4)
    content = own_names(model, batch_norm(latents) | wrong)
    (tmp_path / "ae.safetensors").write_bytes(safetensors_bytes(content, {}))
    torch.save(content, tmp_path / "ae.pt")
    for name in ("ae.safetensors", "ae.pt"):
        with pytest.raises(ValueError, match=mentions(*parts)):
            AutoEncoderKL.from_checkpoint(tmp_path / name)


@pytest.mark.parametrize("shape", [(), (0,), (4,), (8, 0, 1, 1), (0, 0)])
@pytest.mark.parametrize("key", ["decoder.post_quant_conv.weight", "decoder.conv_in.weight"])
def test_an_invalid_convolution_shape_is_an_error(
    latents: dict[str, Any], key: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = AutoEncoderKL(TINY_DDCONFIG, None if "conv_in" in key else 4)
    content = own_names(model, batch_norm(latents)) | {key: torch.zeros(shape)}
    (tmp_path / "ae.safetensors").write_bytes(safetensors_bytes(content, {}))
    name = key.replace("decoder.post", "post")
    layout = "[out, in, height, width]"
    with pytest.raises(ValueError, match=mentions(name, list(shape), layout)):
        AutoEncoderKL.from_checkpoint(tmp_path / "ae.safetensors")
