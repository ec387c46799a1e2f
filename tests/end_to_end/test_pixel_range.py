"""A data set of 12 bits stored in 16: the same range from training to the latents."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from kl_vae import AutoEncoderKL
from kl_vae.cli.main import main
from kl_vae.data import LatentDataset, read_image
from tests.image_kinds import columns, png
from tests.messages import is_about

TRAIN = ["train", "quickstart", "data.recolor=false", "data.resize=null", "data.crop=48"]
TRAIN += ["model.params.ddconfig.in_channels=1", "model.params.ddconfig.out_ch=1"]
TRAIN += ["training.global_batch_size=2", "training.max_steps=1", "data.validation.fraction=0.3"]
RANGE = {"uint16": [0, 4095]}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        png(folder / f"{i}.png", columns((0, 100 * i, 4095), np.uint16))
    return folder


def test_the_range_of_a_data_set_is_kept(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    command = [*TRAIN, f"data.train.root={images}", f"--run-dir={run}"]
    with caplog.at_level(logging.INFO):
        assert main(command) == 0
    assert is_about(caplog.text, "uint16", 4095, "data.range")
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["range"] == RANGE
    assert main([*command, "training.max_steps=2"]) == 0  # resumes

    # images that alone would be read as 10 bits
    dark = tmp_path / "dark"
    dark.mkdir()
    png(dark / "a.png", columns((0, 500, 1000), np.uint16))
    exported = tmp_path / "model.pt"
    assert main(["export", "--checkpoint", str(run), "--out", str(exported)]) == 0
    for checkpoint in (run, exported):
        assert AutoEncoderKL.from_checkpoint(checkpoint).pixel_range == RANGE
        out = tmp_path / f"of_{checkpoint.name}"
        common = ["--checkpoint", str(checkpoint), "--images", str(dark), "--num-workers", "0"]
        assert main(["reconstruct", *common, "--out", str(out)]) == 0
        assert json.loads((out / "summary.json").read_text())["range"] == RANGE
        shown = read_image(out / "gallery" / "originals" / "a.png", 1)[0, 0, ::16]
        assert shown.tolist() == [0, 31, 62]

    latents = tmp_path / "latents"
    assert main(["encode", *common, "--out", str(latents), "--crop", "48"]) == 0
    assert LatentDataset(latents).index.settings.range == RANGE
    given = tmp_path / "given"
    assert main(["reconstruct", *common, "--out", str(given), "--range", "0", "1000"]) == 0
    shown = read_image(given / "gallery" / "originals" / "a.png", 1)[0, 0, ::16]
    assert shown.tolist() == [0, 128, 255]


def test_output_of_16_bits(tmp_path: Path, images: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert main([*TRAIN, f"data.train.root={images}", f"--run-dir={run}"]) == 0
    command = ["reconstruct", "--checkpoint", str(run), "--images", str(images)]
    assert main([*command, "--out", str(out), "--bits", "16", "--num-workers", "0"]) == 0
    from PIL import Image

    model = AutoEncoderKL.from_checkpoint(run)
    x = torch.from_numpy(columns((0, 6, 255), np.uint8)).float()[None, None] / 127.5 - 1
    with torch.no_grad():
        expected = (model(x, sample_posterior=False)[0].clamp(-1, 1) + 1) / 2
    written = np.asarray(Image.open(out / "1.png")).astype(np.float64)
    assert len(np.unique(written)) > 256
    np.testing.assert_allclose(written / 65535, expected[0, 0], atol=2e-5)
