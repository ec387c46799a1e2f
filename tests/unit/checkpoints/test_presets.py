"""Presets of published autoencoders, and the check that a file is the named one."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.presets import PRESETS, Preset, find_preset
from kl_vae.ddconfig import DDConfig
from kl_vae.latents import LatentNormalization
from kl_vae.runtime.config_file import load_model_params
from kl_vae.runtime.files import sha256_of
from tests.messages import is_about, mentions

PAGE = Path(__file__).resolve().parents[3] / "docs" / "checkpoints.md"


@pytest.mark.parametrize("name", ["kl-f4", "kl-f8", "kl-f16", "kl-f32"])
def test_the_shipped_configs_have_the_same_architecture(name: str) -> None:
    params = load_model_params(f"{name}-published")
    preset = PRESETS[name]
    assert DDConfig.from_dict(params["ddconfig"]) == preset.ddconfig
    assert params["embed_dim"] == preset.embed_dim


def test_presets_are_complete() -> None:
    digests = [digest for preset in PRESETS.values() for digest in preset.sha256]
    assert len(set(digests)) == len(digests)
    for name, preset in PRESETS.items():
        assert name == preset.name and preset.licence
        assert re.fullmatch(r"hf://[\w.-]+/[\w.-]+(/vae)?|https://\S+\.zip", preset.weights)
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in preset.sha256)
        assert preset.latents is None or not preset.latents.per_channel


def test_presets_are_documented() -> None:
    for name, preset in PRESETS.items():
        row = next(line for line in PAGE.read_text().splitlines() if f"| `{name}` |" in line)
        assert preset.licence in row and preset.weights in row
        if preset.latents is not None:
            assert f"{preset.latents.scale_factor}" in row
            assert not preset.latents.shift_factor or f"{preset.latents.shift_factor}" in row


@pytest.fixture
def file(tiny_ddconfig: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of `mine`; `other` has its architecture and another scale, `wide` another one."""
    config = DDConfig.from_dict(tiny_ddconfig)
    torch.manual_seed(0)
    torch.save(AutoEncoderKL(config, 3).state_dict(), tmp_path / "weights.pt")
    mine = Preset(
        name="mine",
        ddconfig=config,
        embed_dim=3,
        latents=LatentNormalization(scale_factor=0.5),
        weights="https://somewhere/mine.zip",
        licence="MIT",
    )
    scale = LatentNormalization(scale_factor=0.25)
    wide = dataclasses.replace(config, ch=64)
    presets = {
        "mine": mine,
        "other": dataclasses.replace(mine, name="other", latents=scale),
        "wide": dataclasses.replace(mine, name="wide", ddconfig=wide),
    }
    monkeypatch.setattr("kl_vae.checkpoints.presets.PRESETS", presets)
    return tmp_path / "weights.pt"


def test_a_file_of_the_architecture_gets_the_scale(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = AutoEncoderKL.from_preset("mine", file)
    assert not model.training
    assert model.latents == LatentNormalization(scale_factor=0.5)
    z = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(model.normalize_latents(z), 0.5 * z)
    assert is_about(caplog.text, file, "architecture", "mine", "sha256")


def test_another_architecture_is_an_error(file: Path) -> None:
    parts = (file, "wide", "ch=32", 64, "mine, other", "from_checkpoint")
    with pytest.raises(ValueError, match=mentions(*parts)):
        AutoEncoderKL.from_preset("wide", file)


def test_another_scale_is_an_error(file: Path, tmp_path: Path) -> None:
    AutoEncoderKL.from_preset("mine", file).save_compvis(tmp_path / "mine.safetensors")
    assert AutoEncoderKL.from_preset("mine", tmp_path / "mine.safetensors").latents is not None
    with pytest.raises(ValueError, match=mentions("other", "scale_factor=0.5", 0.25)):
        AutoEncoderKL.from_preset("other", tmp_path / "mine.safetensors")


def test_a_published_file_is_identified_by_its_sha256(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kl_vae.checkpoints.presets import PRESETS as presets

    known = dataclasses.replace(presets["other"], sha256=(sha256_of(file),))
    monkeypatch.setitem(presets, "other", known)
    caplog.set_level(logging.INFO)
    assert AutoEncoderKL.from_preset("other", file).latents == known.latents
    assert is_about(caplog.text, "weights.pt", "published", "other")
    with pytest.raises(ValueError, match=mentions("mine", "sha256", "other")):
        AutoEncoderKL.from_preset("mine", file)


def test_a_manual_download_is_an_error_with_its_url(file: Path) -> None:
    parts = ("mine", "https://somewhere/mine.zip", "weights=FILE")
    with pytest.raises(ValueError, match=mentions(*parts)):
        AutoEncoderKL.from_preset("mine")


def test_an_unknown_name_suggests_known_ones() -> None:
    with pytest.raises(ValueError, match=mentions("'sdxl'", "sdxl-vae")):
        find_preset("sdxl")
    with pytest.raises(ValueError, match=mentions("'x'", "kl-f4, kl-f8")):
        AutoEncoderKL.from_preset("x")
