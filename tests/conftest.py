"""Small images and a small config that many tests train on."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.attention import ATTENTION
from kl_vae.blocks import BLOCKS, NORMALIZATION
from kl_vae.losses import LOSSES

# tiny tensors gain nothing from threads, which wait long for one another on a busy machine
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # the commands that tests start

TINY_DDCONFIG: dict[str, Any] = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--moments", type=int, default=10, help="how often test_interruptions.py kills each command"
    )


@pytest.fixture(autouse=True)
def forget_registered_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, such as an example of the README, is gone after it."""
    for registry in (ATTENTION, BLOCKS, NORMALIZATION, LOSSES):
        monkeypatch.setattr(registry, "_constructors", dict(registry._constructors))


@pytest.fixture
def tiny_ddconfig() -> dict[str, Any]:
    """An architecture with every kind of layer, f = 2."""
    return copy.deepcopy(TINY_DDCONFIG)


@pytest.fixture
def tiny_model(tiny_ddconfig: dict[str, Any]) -> AutoEncoderKL:
    """Latents of 3 channels and the default loss; the weights are always the same."""
    torch.manual_seed(0)
    return AutoEncoderKL(tiny_ddconfig, embed_dim=3)


@pytest.fixture
def images() -> Tensor:
    """Two images [2, 3, 16, 16] in [-1, 1]."""
    return 2.0 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 1.0


def write_images(
    folder: Path, number: int, size: tuple[int, int] = (24, 20), mode: str = "RGB"
) -> Path:
    """Write smooth random images, 000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        small = rng.integers(0, 256, (5, 6, len(mode)), dtype=np.uint8).squeeze()
        picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def make_images() -> Callable[..., Path]:
    """`write_images`."""
    return write_images


@pytest.fixture
def project(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working directory with 24 images in `images` and the config `tiny.yaml` for them."""
    make_images(tmp_path / "images", 24)
    config = {
        "model": {
            "params": {
                "embed_dim": 4,
                "monitor": "val/rec_loss",
                "lossconfig": {"target": "elbo", "params": {"kl_weight": 1.0e-4}},
                "ddconfig": TINY_DDCONFIG,
            }
        },
        "data": {
            "train": {"root": "images"},
            "validation": {"fraction": 0.2},
            "resize": 18,
            "num_workers": 0,
        },
        "training": {"global_batch_size": 8, "max_steps": 6, "log_every_steps": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path
