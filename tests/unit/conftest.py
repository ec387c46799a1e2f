import pytest
import torch

from kl_vae import AutoEncoderKL


def tiny_model(channels: int = 3) -> AutoEncoderKL:
    """Random weights, f = 4."""
    torch.manual_seed(0)
    ddconfig = dict(
        ch=32,
        ch_mult=[1, 1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        in_channels=channels,
        out_ch=channels,
        resolution=16,
        z_channels=2,
    )
    return AutoEncoderKL(ddconfig, embed_dim=2).eval()


@pytest.fixture
def model() -> AutoEncoderKL:
    return tiny_model()


@pytest.fixture
def model_of_five_channels() -> AutoEncoderKL:
    return tiny_model(5)
