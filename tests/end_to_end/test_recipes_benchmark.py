"""`kl-vae benchmark recipes` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kl_vae.cli.main import main


@pytest.fixture
def command(project: Path) -> list[str]:
    """Compare on the project's images, at a size that every network takes."""
    from torchvision.models import squeezenet1_1

    torch.save(squeezenet1_1(weights=None).features.state_dict(), "squeeze.pth")
    command = ["benchmark", "recipes", "--config", "tiny.yaml", "--out", "out"]
    command += ["--perceptual-features", "squeeze.pth"]
    return [*command, "data.resize=24", "data.crop=24", "training.global_batch_size=4"]


def test_every_recipe_trains_and_is_measured(command: list[str], capsys: Any) -> None:
    recipes = ["published:3:1.0e-3", "ours:3", "mse:3", "gan:3"]
    flags = [flag for recipe in recipes for flag in ("--recipe", recipe)]
    assert main([*command, *flags, "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")][1:]
    names = ["published at 0.001", "ours", "mse", "gan"]
    assert [row[0].strip() for row in rows] == [name for name in names for _ in range(3)]
    for row in rows:
        assert all(" ± " in cell for cell in row[3:5])
        measured = " ± " in row[5]
        assert measured == ("mse" not in row[0] or row[1].strip() == "3")  # mse: at the end
    assert "last PSNR of published at 0.001 (" in printed
    assert "Measured on " in printed
    with Image.open("out/comparison.png") as picture:
        assert picture.size[1] == 5 * 26 + 2  # inputs and four reconstructions of 24 pixels
    gan = Path("out/gan_3_seed1/metrics.jsonl").read_text().splitlines()
    assert any("train/d_weight" in json.loads(line) for line in gan)


def test_a_mistake_is_one_line(command: list[str], capsys: Any) -> None:
    assert main([*command, "--recipe", "best:3"]) == 2
    assert "recipe 'best:3': write RECIPE:STEPS" in capsys.readouterr().err
    assert main([*command, "--recipe", "ours:3", "data.validation.fraction=0.0"]) == 2
    assert "a comparison needs validation images" in capsys.readouterr().err
