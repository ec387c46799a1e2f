"""The same numbers as diffusers' AutoencoderKL, with our weights copied into it."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae import AutoEncoderKL

LEVELS = 3

# ours -> diffusers', from the first rule that fits; a number k that counts up is LEVELS - 1 - k
KEYS = (
    (r"(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"encoder\.down\.(\d)\.block\.(\d)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d)\.block\.(\d)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"decoder\.up\.(\d)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
)
LEAVES = {"nin_shortcut": "conv_shortcut"}
ATTENTION_LEAVES = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def in_diffusers(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A key and tensor of ours as diffusers has them."""
    for ours, theirs in KEYS:
        if re.match(ours, key):
            key = re.sub(ours, theirs, key)
            break
    path, leaf, kind = key.rsplit(".", 2) if key.count(".") > 1 else ("", *key.split("."))
    if ".attentions." in key:
        leaf = ATTENTION_LEAVES[leaf]
        tensor = tensor.reshape(tensor.shape[:2]) if tensor.ndim == 4 else tensor  # linear: [C, C]
    # diffusers counts the decoder's levels from the lowest resolution
    path = re.sub(r"(?<=up_blocks\.)\d", lambda level: str(LEVELS - 1 - int(level.group())), path)
    return ".".join(filter(None, (path, LEAVES.get(leaf, leaf), kind))), tensor


@pytest.fixture(params=[3, None], ids=["quant convolutions", "none"])
def models(request: pytest.FixtureRequest, tiny_ddconfig: dict[str, Any]) -> tuple[Any, Any]:
    """Ours and diffusers', with the same weights."""
    embed_dim: int | None = request.param
    z_channels = 3 if embed_dim else 4  # diffusers knows only embed_dim = z_channels
    ddconfig = tiny_ddconfig | {
        "ch_mult": [1, 2, 2],
        "attn_resolutions": [],
        "z_channels": z_channels,
    }
    torch.manual_seed(0)
    ours = AutoEncoderKL(ddconfig, embed_dim).eval()
    for parameter in ours.parameters():  # norms too should tell one channel from another
        nn.init.normal_(parameter, mean=0.02, std=0.08)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that diffusers looks for
        diffusers = pytest.importorskip("diffusers")
        theirs = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * LEVELS,
            up_block_types=("UpDecoderBlock2D",) * LEVELS,
            block_out_channels=(32, 64, 64),
            layers_per_block=ddconfig["num_res_blocks"],
            latent_channels=z_channels,
            norm_num_groups=32,
            use_quant_conv=embed_dim is not None,
            use_post_quant_conv=embed_dim is not None,
        ).eval()
    renamed = dict(in_diffusers(key, x) for key, x in ours.state_dict().items())
    theirs.load_state_dict(renamed)  # strict: every tensor has its place
    return ours, theirs


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_moments_kl_and_images_are_those_of_diffusers(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    x = 2.0 * torch.rand(2, 3, 16, 24) - 1.0
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    close(posterior.parameters, expected.parameters)
    close(posterior.kl(), expected.kl())
    z = torch.randn(2, ours.latent_channels, 4, 6)
    close(ours.decode(z), theirs.decode(z).sample)
    close(ours(x, sample_posterior=False)[0], theirs(x).sample)
