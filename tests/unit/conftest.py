import pytest

from kl_vae import AutoEncoderKL
from tests.tiny import tiny_model


@pytest.fixture
def model() -> AutoEncoderKL:
    """Random weights, f = 4."""
    return tiny_model(ch_mult=[1, 1, 1])


@pytest.fixture
def model_of_five_channels() -> AutoEncoderKL:
    return tiny_model(ch_mult=[1, 1, 1], in_channels=5, out_ch=5)
