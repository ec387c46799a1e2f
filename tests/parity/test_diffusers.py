"""The same numbers as diffusers' AutoencoderKL, and files that go both ways."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae import AutoEncoderKL, DiagonalGaussianDistribution
from kl_vae.checkpoints.diffusers import from_diffusers
from kl_vae.checkpoints.presets import PRESETS, Preset
from kl_vae.ddconfig import DDConfig
from kl_vae.latents import LatentNormalization
from tests.processes import assert_same

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that diffusers looks for

PARAMETERS = {
    "kl-f4": 55_312_063,
    "kl-f8": 83_653_863,
    "kl-f16": 69_610_963,
    "kl-f32": 103_880_131,
    "sd-v1": 83_653_863,
    "sdxl-vae": 83_653_863,
    "sd3": 83_819_683,
    "flux.1": 83_819_683,
}


def of_diffusers(config: DDConfig, embed_dim: int | None, **keys: Any) -> Any:
    """Diffusers' own class with that architecture, and random weights."""
    torch.manual_seed(0)
    attention = [config.has_attention(level) for level in range(len(config.ch_mult))]
    return diffusers.AutoencoderKL(
        **{
            "in_channels": config.in_channels,
            "out_channels": config.out_ch,
            "block_out_channels": config.channels,
            "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attention],
            "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attention)],
            "layers_per_block": config.num_res_blocks,
            "latent_channels": config.z_channels,
            "norm_num_groups": config.norm_groups,
            "use_quant_conv": embed_dim is not None,
            "use_post_quant_conv": embed_dim is not None,
            "mid_block_add_attention": config.attn_type != "none",
            "sample_size": config.resolution,
            **keys,
        }
    ).eval()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Within the tolerance, of the largest value where that is above 1."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1.0)


@torch.no_grad()
def assert_same_function(ours: AutoEncoderKL, theirs: Any, height: int, width: int) -> None:
    """The same moments, KL and images, in float64: float32's error depends on the processor."""
    ours, theirs = ours.double(), theirs.double()
    generator = torch.Generator().manual_seed(1)
    shape = (1, ours.config.in_channels, height, width)
    x = 2.0 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1.0
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    assert_close(posterior.parameters, expected.parameters, 1e-9)
    assert_close(posterior.kl(), expected.kl(), 1e-9)
    z = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float64)
    assert_close(ours.decode(z), theirs.decode(z).sample, 1e-9)
    ours.float(), theirs.float()  # which is exact


def assert_loads(folder: Path, theirs: Any) -> None:
    """Diffusers loads the folder whole, and it is bit for bit the model that it was."""
    again, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())  # missing, unexpected and mismatched keys, messages
    own = theirs.state_dict()
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(x, own[key]) for key, x in again.state_dict().items())
    unsaid = {"_use_default_values", "_diffusers_version", "_name_or_path"}
    before, after = (
        {key: list(v) if isinstance(v, tuple) else v for key, v in model.config.items()}
        for model in (theirs, again)
    )
    assert {k: v for k, v in before.items() if k not in unsaid} == {
        k: v for k, v in after.items() if k not in unsaid
    }


@pytest.fixture
def folder() -> Iterator[Path]:
    """Removed at once: files of gigabytes that stay are written to the disk, and fill it."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def goes_both_ways(preset: Preset, folder: Path) -> AutoEncoderKL:
    """Diffusers' weights -> `theirs` -> our model, which is returned -> `ours` -> diffusers."""
    scale = preset.latents or LatentNormalization(scale_factor=0.18215)
    theirs = of_diffusers(
        preset.ddconfig,
        preset.embed_dim,
        scaling_factor=scale.scale_factor,
        shift_factor=scale.shift_factor or None,
    )
    theirs.save_pretrained(folder / "theirs")
    ours = AutoEncoderKL.from_checkpoint(folder / "theirs")
    assert ours.config == preset.ddconfig and ours.embed_dim == preset.embed_dim
    assert ours.latents == scale
    f = ours.downsampling_factor
    assert_same_function(ours, theirs, 2 * f, 3 * f)
    ours.save_pretrained(folder / "ours")
    assert_loads(folder / "ours", theirs)
    return ours


@pytest.mark.parametrize("name", ["kl-f4", "kl-f16", "kl-f32", "sdxl-vae", "sd3"])
def test_a_narrow_published_architecture_goes_both_ways(name: str, folder: Path) -> None:
    preset = PRESETS[name]
    goes_both_ways(replace(preset, ddconfig=replace(preset.ddconfig, ch=32)), folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_architecture_goes_both_ways(name: str, folder: Path) -> None:
    preset = PRESETS[name]
    ours = goes_both_ways(preset, folder)
    assert sum(x.numel() for x in ours.parameters()) == PARAMETERS[name]
    again = AutoEncoderKL.from_preset(name, folder / "ours")
    assert again.latents == preset.latents or preset.latents is None
    assert_same(dict(again.state_dict()), dict(ours.state_dict()))


TINY = DDConfig(
    ch=32,
    out_ch=3,
    ch_mult=(1, 2, 2),
    num_res_blocks=1,
    attn_resolutions=(8,),
    in_channels=3,
    resolution=16,
    z_channels=4,
)


@pytest.mark.parametrize(
    ("config", "embed_dim"),
    [
        (TINY, 4),
        (TINY, None),
        (replace(TINY, attn_resolutions=(16, 4)), 4),
        (replace(TINY, attn_resolutions=(), attn_type="none"), None),
        (replace(TINY, ch=24, norm_groups=8, in_channels=1, out_ch=1), 4),
        (replace(TINY, ch_mult=(1,), attn_resolutions=(), resolution=4), 4),
    ],
    ids=["quant", "no quant", "levels", "no attention", "groups, grey", "one level"],
)
def test_our_weights_are_its_weights(
    config: DDConfig, embed_dim: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    latents = {"mean": [0.5, 1.0, 2.0, 4.0], "std": [1.0, 2.0, 3.0, 4.0], "per_channel": True}
    ours = AutoEncoderKL(config, embed_dim, latents=latents).eval()
    for parameter in ours.parameters():  # norms too should tell one channel from another
        nn.init.normal_(parameter, mean=0.02, std=0.08)
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = diffusers.AutoencoderKL.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values())
    assert theirs.config.latents_mean == latents["mean"]
    assert theirs.config.latents_std == latents["std"]
    assert theirs.config.scaling_factor == 1.0  # its pipelines multiply by it as well
    assert_same_function(ours, theirs, 16, 24)


def test_the_oldest_names_of_attention(tmp_path: Path) -> None:
    theirs = of_diffusers(TINY, 4)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "diffusion_pytorch_model.bin"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, x in torch.load(file, weights_only=True).items():
        for name, oldest in names.items():
            key = key.replace(f".{name}.", f".{oldest}.")
        old[key] = x
    assert any("mid_block.attentions.0.query.weight" in key for key in old)
    torch.save(old, file)
    assert_same_function(AutoEncoderKL.from_checkpoint(tmp_path), theirs, 16, 24)


def test_statistics_of_each_channel_come_with_its_factor(tmp_path: Path) -> None:
    """Pipelines that know them multiply by scaling_factor and divide by latents_std."""
    mean, std = [0.5, 1.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0]
    of_diffusers(TINY, 4, latents_mean=mean, latents_std=std, scaling_factor=0.5).save_pretrained(
        tmp_path
    )
    z = torch.randn(1, 4, 3, 3)
    expected = (z - torch.tensor(mean).view(4, 1, 1)) * 0.5 / torch.tensor(std).view(4, 1, 1)
    assert_close(AutoEncoderKL.from_checkpoint(tmp_path).normalize_latents(z), expected)


@pytest.fixture
def flux2() -> Any:
    """FLUX.2's class, small, with a batch norm that has seen something."""
    if not hasattr(diffusers, "AutoencoderKLFlux2"):
        pytest.skip("this diffusers has no AutoencoderKLFlux2")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLFlux2(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=16,
    ).eval()
    nn.init.normal_(theirs.bn.running_mean)
    nn.init.uniform_(theirs.bn.running_var, 0.5, 2.0)
    return theirs


def assert_same_latents(ours: AutoEncoderKL, theirs: Any) -> None:
    """Our normalisation is its batch norm over patches of 2 x 2 latents."""
    z = torch.randn(2, 4, 6, 4)
    patches = z.view(2, 4, 3, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 16, 3, 2)
    normalised = theirs.bn(patches)  # in eval mode
    expected = normalised.view(2, 4, 2, 2, 3, 2).permute(0, 1, 4, 2, 5, 3).reshape(2, 4, 6, 4)
    assert_close(ours.normalize_latents(z), expected)
    assert_close(ours.denormalize_latents(expected), z)


def test_flux_2_goes_both_ways(flux2: Any, tmp_path: Path) -> None:
    flux2.save_pretrained(tmp_path / "theirs")
    ours = AutoEncoderKL.from_checkpoint(tmp_path / "theirs")
    assert_same_function(ours, flux2, 16, 24)
    assert_same_latents(ours, flux2)
    ours.save_pretrained(tmp_path / "ours")
    again, info = diffusers.AutoencoderKLFlux2.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values())
    own = flux2.state_dict()
    for key, x in again.state_dict().items():
        assert torch.equal(x, own[key]) or key == "bn.num_batches_tracked", key
    assert again.config.patch_size == [2, 2]
    assert again.config.batch_norm_eps == flux2.config.batch_norm_eps


def test_flux_2_as_first_published(flux2: Any, tmp_path: Path) -> None:
    """One file, whose quant convolutions lie in encoder and decoder."""
    tensors = from_diffusers(flux2.state_dict())
    moved = {
        "quant_conv": "encoder.quant_conv",
        "post_quant_conv": "decoder.post_quant_conv",
    }
    for name, published in moved.items():
        for kind in ("weight", "bias"):
            tensors[f"{published}.{kind}"] = tensors.pop(f"{name}.{kind}")
    torch.save(tensors, tmp_path / "ae.pt")
    ours = AutoEncoderKL.from_checkpoint(tmp_path / "ae.pt")
    assert_same_function(ours, flux2, 16, 24)
    assert_same_latents(ours, flux2)


@pytest.mark.parametrize("generator", ["one", "one per image"])
def test_a_sample_is_that_of_diffusers(generator: str) -> None:
    from diffusers.models.autoencoders import vae

    def generators() -> Any:
        each = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return each[0] if generator == "one" else each

    moments = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    ours = DiagonalGaussianDistribution(moments).sample(generator=generators())
    theirs = vae.DiagonalGaussianDistribution(moments).sample(generator=generators())
    assert torch.equal(ours, theirs)
