"""The numbers of diffusers' AutoencoderKL, of accelerated models."""

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.accel.accelerate import accelerate_as
from kl_vae.accel.convolution import suits
from kl_vae.checkpoints.diffusers import to_diffusers
from kl_vae.checkpoints.presets import PRESETS

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that diffusers looks for


@pytest.mark.slow
@torch.inference_mode()
def test_the_published_architecture_in_every_mode() -> None:
    """To 1e-3 of images in [-1, 1] with Winograd's convolutions, and to 1e-4 without."""
    config = PRESETS["kl-f8"].ddconfig
    torch.manual_seed(0)
    with torch.inference_mode(False):
        ours = AutoEncoderKL(config, 4).eval()
        theirs = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=config.channels,
            layers_per_block=config.num_res_blocks,
        ).eval()
        theirs.load_state_dict(to_diffusers(ours.state_dict()))
    x, z = 2.0 * torch.rand(1, 3, 88, 72) - 1.0, torch.randn(1, 4, 11, 9)
    assert suits(ours.decoder.up[0].block[1].conv1, torch.empty(1, 128, 88, 72))
    moments, image = theirs.encode(x).latent_dist.parameters, theirs.decode(z).sample
    for mode, tolerance in (("auto", 1e-3), ("exact", 1e-4), ("off", 1e-4)):
        accelerate_as(mode, ours)
        assert (ours.encode(x).parameters - moments).abs().max() < tolerance
        assert (ours.decode(z) - image).abs().max() < tolerance
