"""`kl-vae sample` as a user types it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from kl_vae import AutoEncoderKL
from kl_vae.cli.main import main


@pytest.fixture
def model(tmp_path) -> list[str]:
    """Save random weights and their config, f = 2; return the arguments that name them."""
    torch.manual_seed(0)
    ddconfig = dict(
        ch=32,
        ch_mult=[1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        in_channels=3,
        out_ch=3,
        resolution=16,
        z_channels=2,
    )
    torch.save(AutoEncoderKL(ddconfig, embed_dim=None).state_dict(), tmp_path / "model.pt")
    config = {"model": {"params": {"ddconfig": ddconfig, "embed_dim": None}}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    return ["--checkpoint", f"{tmp_path}/model.pt", "--config", f"{tmp_path}/model.yaml"]


def test_samples_as_a_user_types_it(tmp_path, model):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kl_vae.cli", "sample", *model, "--out", str(out)]
    done = subprocess.run([*command, "--number", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"3 samples in {out} (grid.png shows 3 of them)"
    names = ["grid.png", *(f"sample_{i:05d}.png" for i in range(3))]
    assert sorted(path.name for path in out.iterdir()) == names
    sizes = []
    for name in names:
        with Image.open(out / name) as picture:
            sizes.append(picture.size)
    assert sizes == [(2 * 18 + 2, 2 * 18 + 2), (16, 16), (16, 16), (16, 16)]


def test_an_image_depends_on_seed_and_number_alone(tmp_path, model):
    pictures = {}
    for name, arguments in {
        "first": ["--number", "5", "--batch-size", "2"],
        "again": ["--number", "3", "--batch-size", "3"],
        "other": ["--number", "3", "--seed", "1"],
    }.items():
        out = tmp_path / name
        assert main(["sample", *model, "--out", str(out), "--size", "12", *arguments]) == 0
        with Image.open(out / "sample_00002.png") as picture:
            pictures[name] = np.asarray(picture).astype(int)
    assert pictures["first"].shape == (12, 12, 3)
    # the sums of a larger batch may be rounded in another order
    assert abs(pictures["first"] - pictures["again"]).max() <= 1
    assert abs(pictures["first"] - pictures["other"]).max() > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "13"], "size=13: must be a multiple of 2; give 12"),
        (["--checkpoint", "none.pt"], "no such checkpoint: none.pt"),
        (["--out", "{}/model.pt"], "model.pt is a file; give a folder"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, model, capsys, arguments, message):
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert main(["sample", *model, "--out", f"{tmp_path}/out", *arguments]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("kl-vae sample: error: ")
    assert message in last_line
    assert not (tmp_path / "out").exists()
