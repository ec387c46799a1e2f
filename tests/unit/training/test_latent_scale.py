"""The scale of the latents survives a run, and a run says if it moved it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import kl_vae
from kl_vae import AutoEncoderKL
from kl_vae.latents import LatentNormalization
from kl_vae.training.validate import warn_about_scale
from tests.conftest import TINY_DDCONFIG
from tests.messages import is_about

LATENTS: dict[str, dict[str, Any]] = {
    "scale": {"scale_factor": 0.13025, "shift_factor": 0.1159},
    "channels": {"mean": (0.5, 1.0, 2.0, 3.0), "std": (1.0, 2.0, 3.0, 4.0), "per_channel": True},
    "batch norm": {
        "mean": tuple(0.25 * i for i in range(16)),
        "std": tuple(1.0 + i for i in range(16)),
        "per_channel": True,
        "patch_size": 2,
    },
}
KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "patch_size")


@pytest.mark.parametrize("kind", LATENTS)
def test_a_fine_tuned_diffusers_folder_keeps_its_scale(
    kind: str, project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    AutoEncoderKL(TINY_DDCONFIG, 4, latents=LATENTS[kind]).save_pretrained("vae")
    overrides = [
        "model.params.ckpt_path=vae",
        "training.freeze=[encoder.*, quant_conv.*]",
        "training.ema_decay=0.9",
        "training.save_every_steps=1",
    ]
    # stopped and resumed, with the same config
    for steps in (1, 2):
        kl_vae.train(
            "tiny.yaml", "run", overrides=[*overrides, f"training.max_steps={steps}"], device="cpu"
        )
    expected = AutoEncoderKL.from_checkpoint("vae").latents
    for ema in (True, False):
        assert AutoEncoderKL.from_checkpoint("run", ema=ema).latents == expected
    kl_vae.convert("run", "out", "diffusers")
    before, after = (json.loads((Path(x) / "config.json").read_text()) for x in ("vae", "out"))
    assert {key: before.get(key) for key in KEYS} == {key: after.get(key) for key in KEYS}
    kl_vae.export("run", "out.pt")
    kl_vae.convert("out.pt", "out.safetensors", "compvis")
    for path in ("out", "out.pt", "out.safetensors"):
        assert AutoEncoderKL.from_checkpoint(path).latents == expected
    # the encoder is frozen, so that the scale is right whatever the images
    assert not any(is_about(line, "--statistics") for line in caplog.messages)


def test_a_run_that_moves_the_scale_says_so_at_its_end(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    AutoEncoderKL(TINY_DDCONFIG, 4, latents={"scale_factor": 0.01}).save_pretrained("vae")
    overrides = ["model.params.ckpt_path=vae", "training.max_steps=1"]
    kl_vae.train("tiny.yaml", "run", overrides=overrides, device="cpu")
    lines = [line for line in caplog.messages if is_about(line, "--statistics")]
    assert len(lines) == 1 and is_about(lines[0], "scale_factor=0.01")


@pytest.mark.parametrize("kind", LATENTS)
@pytest.mark.parametrize(
    ("factor", "warns"), [(1.0, False), (1.04, False), (1.06, True), (0.9, True)]
)
def test_five_percent_are_reported(
    kind: str, factor: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoEncoderKL(TINY_DDCONFIG, 4, latents=LATENTS[kind])
    latents = model.latents
    assert latents is not None
    torch.manual_seed(0)
    # latents of the stated statistics, times a factor
    z = torch.randn(4, 4, 64, 64, dtype=torch.float64)
    z = factor * latents.denormalize(z / z.std())
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    warn_about_scale(model, {"val/latent_mean": mean.tolist(), "val/latent_std": std.tolist()})
    assert bool(caplog.messages) == warns
    assert latents.scale_of(mean, std) == pytest.approx(factor, abs=0.008)


def test_without_metrics_or_a_scale_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoEncoderKL(TINY_DDCONFIG, 4)
    warn_about_scale(model, {"val/latent_mean": [0.0] * 4, "val/latent_std": [9.0] * 4})
    model.latents = LatentNormalization()
    warn_about_scale(model, {})
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        warn_about_scale(model, {"train/latent_mean": [0.0] * 4, "train/latent_std": [9.0] * 4})
    assert is_about(caplog.text, 9, "scale_factor=1.0")
