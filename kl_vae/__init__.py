"""A KL-regularised image autoencoder (the first stage of latent diffusion) in plain PyTorch."""

from kl_vae.attention import make_attention, register_attention
from kl_vae.blocks import register_block, register_normalization
from kl_vae.ddconfig import DDConfig
from kl_vae.decoder import Decoder
from kl_vae.distribution import DiagonalGaussianDistribution
from kl_vae.encoder import Encoder
from kl_vae.losses import register_loss
from kl_vae.model import AutoEncoderKL
from kl_vae.version import __version__

__all__ = [
    "AutoEncoderKL",
    "DDConfig",
    "Decoder",
    "DiagonalGaussianDistribution",
    "Encoder",
    "__version__",
    "make_attention",
    "register_attention",
    "register_block",
    "register_loss",
    "register_normalization",
]
